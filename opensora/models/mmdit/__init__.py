"""MMDiT: the multimodal diffusion transformer (registered as ``flux``)."""

from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.mmdit.model import Flux, MMDiTModel

__all__ = ["Flux", "MMDiTConfig", "MMDiTModel"]
