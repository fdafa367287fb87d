"""Text encoders (registered as ``text_embedder``). Its configuration is read without torch."""

from typing import TYPE_CHECKING

from opensora.models.text.config import TextEmbedderConfig
from opensora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from opensora.models.text.embedder import HFEmbedder

__all__ = ["HFEmbedder", "TextEmbedderConfig"]

__getattr__ = lazy_names(__name__, {"HFEmbedder": "embedder"})
