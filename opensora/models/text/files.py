"""What a folder of a text encoder holds, from its config and the headers of its files: nothing is loaded."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora.config.options import ModelOptions
from opensora.models.quantization.loading import Quantization
from opensora.models.text.vocabulary import wrong_vocabulary
from opensora.utils import hub
from opensora.utils.errors import UserError, shorten
from opensora.utils.paths import read_text
from opensora.utils.weights import WeightFiles, index_of, is_costly, open_weights

KINDS = {"t5": "t5", "clip": "clip", "clip_text_model": "clip"}  # model_type of a config.json -> kind of encoder
NAMES = {"t5": "a T5", "clip": "a CLIP"}
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")  # which Hugging Face's library takes, in its order
LAYERS_KEYS, WIDTH_KEYS = {"t5": "num_layers", "clip": "num_hidden_layers"}, {"t5": "d_model", "clip": "hidden_size"}
# sizes that a config.json may leave out
DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": dict(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        feed_forward_proj="relu",
        relative_attention_num_buckets=32,
    ),
    "clip": dict(
        vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, max_position_embeddings=77
    ),
}
Shape = tuple[int, ...]
QUANTIZED = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.\w+)")  # of T5


def quantization(wanted: str | None = None, section: str = "t5") -> Quantization:
    """How the linear layers of T5 are quantised; embeddings and norms are not."""
    return Quantization(lambda name: QUANTIZED.fullmatch(name) is not None, wanted, section)


def check_quantize(section: str, from_pretrained: str, wanted: str | None) -> None:
    """See that an encoder can have the quantised weights that its section asks for, or its file has.

    Raises:
        UserError: CLIP, a hub id, or see :meth:`Quantization.kind`.
    """
    folder = Path(from_pretrained).expanduser()
    if wanted is not None and encoder_kind(from_pretrained) == "clip":
        raise UserError(
            f"{section}.quantize={wanted}: only T5 is quantised; leave it out ({section} is CLIP, and small)"
        )
    if wanted is not None and not folder.is_dir():
        raise UserError(
            f"{section}.quantize={wanted} needs a folder, not a hub id: download it with\n"
            f"  {hub.command_for(from_pretrained)}"
        )
    if folder.is_dir() and encoder_kind(from_pretrained) == "t5":
        quantization(wanted, section).kind(weight_files(folder))


def encoder_kind(from_pretrained: str) -> str:
    """ "t5" or "clip": from the model's own config.json; for bare hub ids from the name.

    Raises:
        UserError: no such folder (says how to get it), no config.json in it, or another kind of model.
    """
    folder = Path(from_pretrained).expanduser()
    if not folder.is_dir():
        parts = from_pretrained.split("/")
        if len(parts) != 2 or parts[0] in ("", ".", "..", "~") or Path(parts[0]).exists():
            command = hub.download_command(folder)
            hint = f"Download it with:\n  {command}" if command else "Give a Hugging Face folder or hub id (org/name)."
            raise UserError(f"No text encoder at {from_pretrained}. {hint}")
        return "clip" if "openai" in from_pretrained or "clip" in from_pretrained.lower() else "t5"
    return _read_config(folder)[0]


def encoder_width(from_pretrained: str) -> int | None:
    """Channels of the embeddings of an encoder's folder, None for a hub id.

    Raises:
        UserError: as `encoder_kind`.
    """
    folder = Path(from_pretrained).expanduser()
    if not folder.is_dir():
        return None
    kind, config = _read_config(folder)
    return int(config[WIDTH_KEYS[kind]])


def check_encoder(section: str, from_pretrained: str, max_length: int | None = None) -> None:
    """See that a folder holds a whole text encoder of the kind that a section is for.

    Args:
        section: ``t5`` or ``clip``; under another name any kind will do.
        from_pretrained: folder; or hub id, of which no more is known than its name tells.
        max_length: tokens that it shall take.

    Raises:
        UserError: no encoder, another kind, or one of which files, tensors or layers are missing or too many.
    """
    kind, folder = encoder_kind(from_pretrained), Path(from_pretrained).expanduser()
    if section in NAMES and kind != section:
        does = "holds" if folder.is_dir() else "names"
        raise UserError(
            f"{section}.from_pretrained={from_pretrained} {does} {NAMES[kind]} text encoder, {section} needs "
            f"{NAMES[section]} one; are t5.from_pretrained and clip.from_pretrained swapped?"
        )
    if not folder.is_dir():
        return
    _, config = _read_config(folder)
    words = wrong_vocabulary(tokenizer_folder(folder), kind, config["vocab_size"])
    wrong = words or _wrong_weights(folder, kind, config)
    if wrong:
        raise UserError(f"Cannot load the text encoder {from_pretrained}: {wrong}")
    positions = config["max_position_embeddings"] if kind == "clip" else math.inf
    if max_length is not None and max_length > positions:
        raise UserError(f"max_length={max_length}: the text encoder {from_pretrained} takes {positions} at most")


def check_text_widths(model: Any, sections: Mapping[str, ModelOptions | None]) -> None:
    """See that the embeddings of text encoders have the widths that a model takes.

    Args:
        model: config of the diffusion model.
        sections: ``t5`` and ``clip`` are looked at.

    Raises:
        UserError: they have not; says which key to set.
    """
    for name, key in (("t5", "context_in_dim"), ("clip", "vec_in_dim")):
        section = sections.get(name)
        path = section.from_pretrained if section is not None and section.type == "text_embedder" else None
        width = encoder_width(path) if path and Path(path).expanduser().is_dir() else None
        if width is not None and width != getattr(model, key):
            raise UserError(
                f"model.{key}={getattr(model, key)}, but the embeddings of {name} ({path}) have width {width}: set "
                f"model.{key}={width}"
            )


def weight_files(folder: Path) -> WeightFiles | None:
    """The weights that Hugging Face's library would load from a folder; None without any, or where only all of them
    together tell what is in them.

    Raises:
        UserError: damaged ones.
    """
    for name in WEIGHT_NAMES:
        file = folder / name
        if file.is_file():
            return None if is_costly(file) else WeightFiles(file, [file])
        if index_of(file).is_file():
            return open_weights(index_of(file))
    return None


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Kind of an encoder and its sizes.

    Raises:
        UserError: no config of one.
    """
    try:
        content = json.loads(read_text(folder / "config.json"))
        model_type = content["model_type"]
        # of a whole CLIP, the half that reads text
        content |= {**(content.get("text_config") or {}), **(content.get("text_config_dict") or {})}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no usable config.json, so it is no Hugging Face text encoder ({error})."
        ) from error
    if model_type not in KINDS:
        raise UserError(f"{folder} holds a {model_type!r} model; text_embedder takes T5 and CLIP text encoders.")
    kind = KINDS[model_type]
    config = {**DEFAULTS[kind], **content}
    for key, default in DEFAULTS[kind].items():
        if not isinstance(config[key], type(default)):
            raise UserError(f"{folder / 'config.json'}: {key}={config[key]!r} cannot be")
    return kind, config


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of an encoder's folder is: in it, or beside it, as pipelines of diffusers have it
    (``text_encoder_2`` and ``tokenizer_2``)."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    return beside if folder.name.startswith("text_encoder") and beside.is_dir() else folder


def _wrong_weights(folder: Path, kind: str, sizes: dict[str, Any]) -> str | None:
    try:
        files = weight_files(folder)
    except UserError as error:
        return str(error)
    if files is None:
        there = any(path.exists() for name in WEIGHT_NAMES for path in (folder / name, index_of(folder / name)))
        return None if there else f"it has no weights ({' or '.join(WEIGHT_NAMES)})"
    shapes = {key.removeprefix("text_model."): shape for key, shape in files.shapes.items()}
    if kind == "t5" and "encoder.embed_tokens.weight" in shapes:
        shapes.setdefault("shared.weight", shapes["encoder.embed_tokens.weight"])
    layer = re.compile(r"encoder\.(?:block|layers)\.(\d+)\.")
    stored = len({match[1] for key in shapes if (match := layer.match(key))})
    key = LAYERS_KEYS[kind]
    if stored != sizes[key]:
        return f"its weights have {stored} layers, its config.json says {key}={sizes[key]}: one of the two is wrong"
    wanted = dict(_t5_shapes(sizes) if kind == "t5" else _clip_shapes(sizes))
    if kind == "t5":
        wanted, parts = quantization().layout(wanted, files)
        wanted |= {name: part.shape for name, part in parts.items()}
    else:
        parts = {}
    lost = [key for key in wanted if key not in shapes]
    if lost:
        return f"its weights lack {shorten(lost)}"
    odd = [f"{key} {[*shapes[key]]} instead of {[*shape]}" for key, shape in wanted.items() if shapes[key] != shape]
    if odd:
        return f"its weights are not of the sizes in its config.json: {shorten(odd)}"
    integers = [
        key
        for key in files.shapes
        if not files.is_floating_point(key) and key.removeprefix("text_model.") in wanted.keys() - parts.keys()
    ]
    return f"it has integers for weights, as quantised files do: {shorten(integers)}" if integers else None


def t5_shapes(folder: Path) -> dict[str, Shape]:
    """Tensors of a T5 encoder's folder, as they are before they are quantised, by its config.json.

    Raises:
        UserError: no config of one.
    """
    return dict(_t5_shapes(_read_config(folder)[1]))


def _t5_shapes(sizes: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, inner, hidden = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
    yield "shared.weight", (sizes["vocab_size"], width)
    ways_in = ("wi_0", "wi_1") if sizes["feed_forward_proj"].startswith("gated") else ("wi",)
    for i in range(sizes["num_layers"]):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        yield from ((f"{attention}.SelfAttention.{name}.weight", (inner, width)) for name in "qkv")
        yield f"{attention}.SelfAttention.o.weight", (width, inner)
        if not i:
            buckets = sizes["relative_attention_num_buckets"]
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (buckets, sizes["num_heads"])
        yield from ((f"{each}.layer_norm.weight", (width,)) for each in (attention, mlp))
        yield from ((f"{mlp}.DenseReluDense.{name}.weight", (hidden, width)) for name in ways_in)
        yield f"{mlp}.DenseReluDense.wo.weight", (width, hidden)
    yield "encoder.final_layer_norm.weight", (width,)


def t5_needs(folder: Path, tokens: int) -> tuple[dict[str, Shape], int] | None:
    """Tensors of the T5 in a folder (:func:`t5_shapes`) and its :func:`t5_activations`; None where there is none."""
    if not (folder / "config.json").is_file():
        return None
    kind, sizes = _read_config(folder)
    return (dict(_t5_shapes(sizes)), t5_activations(sizes, tokens)) if kind == "t5" else None


def t5_activations(sizes: Mapping[str, Any], tokens: int) -> int:
    """Rough number of numbers that a T5 keeps while it embeds one text: attention scores, and the MLP of a block."""
    scores = 4 * sizes["num_heads"] * tokens**2
    return scores + tokens * (4 * sizes["d_ff"] + 8 * sizes["d_model"])


def _clip_shapes(sizes: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    yield "embeddings.token_embedding.weight", (sizes["vocab_size"], width)
    yield "embeddings.position_embedding.weight", (sizes["max_position_embeddings"], width)
    square = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    shapes = {**dict.fromkeys(square, (width, width)), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for i in range(sizes["num_hidden_layers"]):
        for name, shape in shapes.items():
            yield f"encoder.layers.{i}.{name}.weight", shape
            yield f"encoder.layers.{i}.{name}.bias", shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            yield from ((f"encoder.layers.{i}.{name}.{kind}", (width,)) for kind in ("weight", "bias"))
    yield from ((f"final_layer_norm.{kind}", (width,)) for kind in ("weight", "bias"))
