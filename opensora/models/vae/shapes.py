"""What autoencoders are given has the shape and type that they take, or is refused in words."""

from typing import Any

from torch import Tensor

from opensora.utils.errors import UserError

VIDEO, IMAGE = "a video autoencoder", "the image autoencoder"


def check_pixels(x: Any, channels: int, who: str = VIDEO) -> None:
    """Refuse what is no batch ``[B, channels, T, H, W]`` of clips, or, for :data:`IMAGE`, no ``[B, channels, H, W]``
    either.

    Raises:
        UserError: says what was given and what is expected.
    """
    _check(x, "pixels", f"[B, {channels}, T, H, W]", f"[B, {channels}, H, W]", channels, who)


def check_latents(z: Any, channels: int, who: str = VIDEO) -> None:
    """The same for latents.

    Raises:
        UserError: says what was given and what is expected.
    """
    _check(z, "latents", f"[B, {channels}, t, h, w]", f"[B, {channels}, h, w]", channels, who)


def _check(x: Any, name: str, clips: str, images: str, channels: int, who: str) -> None:
    expected = f"{clips} with a frame or more" if who == VIDEO else f"{images} or {clips} with a frame or more"
    if not isinstance(x, Tensor):
        raise UserError(f"{name} of type {type(x).__name__}: {who} takes a tensor {expected}")
    if x.ndim not in ((5,) if who == VIDEO else (4, 5)) or x.shape[1] != channels or 0 in x.shape[2:]:
        raise UserError(f"{name} of shape {[*x.shape]}: {who} takes {expected}")
    if not x.is_floating_point():
        raise UserError(f"{name} of type {x.dtype}: {who} takes floating-point numbers")
