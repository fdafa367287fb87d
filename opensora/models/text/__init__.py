"""Text encoders (registered as ``text_embedder``)."""

from opensora.models.text.embedder import HFEmbedder

__all__ = ["HFEmbedder"]
