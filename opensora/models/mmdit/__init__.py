"""MMDiT: the multimodal diffusion transformer (registered as ``flux``). Its configuration is read without torch."""

from typing import TYPE_CHECKING

from opensora.models.mmdit.config import MMDiTConfig
from opensora.utils.lazy import lazy_names

if TYPE_CHECKING:
    from opensora.models.mmdit.model import Flux, MMDiTModel

__all__ = ["Flux", "MMDiTConfig", "MMDiTModel"]

__getattr__ = lazy_names(__name__, {"Flux": "model", "MMDiTModel": "model"})
