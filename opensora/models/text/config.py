"""Options of the text encoders."""

from dataclasses import dataclass

from opensora.config.choices import QUANTIZERS
from opensora.config.options import ModelOptions, opt


@dataclass(frozen=True, kw_only=True)
class TextEmbedderConfig(ModelOptions):
    """Frozen T5 or CLIP text encoder (`text_embedder`)."""

    from_pretrained: str | None = opt(None, "folder or hub id", reads="file")
    max_length: int = opt(512, "length that texts are padded and cut to", "tokens", least=1, most=32_768)
    keep_suffix: bool = opt(True, "T5: of a text that is cut, keep frame rate and motion score at its end")
    shardformer: bool = opt(False, "ColossalAI's fused layers where present")
    quantize: str | None = opt(
        None, "approximate, T5: weights quantised while loading; none by the file", choices=QUANTIZERS
    )
