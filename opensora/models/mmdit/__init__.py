"""MMDiT: the multimodal diffusion transformer (registered as ``flux``). Its configuration is read without torch."""

from typing import TYPE_CHECKING, Any

from opensora.models.mmdit.config import MMDiTConfig

if TYPE_CHECKING:
    from opensora.models.mmdit.model import Flux, MMDiTModel

__all__ = ["Flux", "MMDiTConfig", "MMDiTModel"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from opensora.models.mmdit import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
