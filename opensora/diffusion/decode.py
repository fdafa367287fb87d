"""Latents to pixels, one sample at a time, in tiles if memory is short; and kept latents to video files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opensora.diffusion import building, outputs
from opensora.diffusion.offload import on_device
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.video import to_uint8

logger = get_logger(__name__)


class DecodeMemoryError(UserError):
    """Decoding ran out of memory.

    Attributes:
        latents: [B, C, T, h, w], what was sampled.
        frames: which frames of the decoded video are to be kept.
        result: all that a pipeline had when it came to decoding (:class:`opensora.diffusion.pipeline.SampleResult`).
    """

    result: Any = None

    def __init__(self, message: str, latents: Tensor, frames: slice) -> None:
        super().__init__(message)
        self.latents = latents
        self.frames = frames


@torch.no_grad()
def decode_latents(
    ae: nn.Module, latents: Tensor, frames: slice, device: torch.device, dtype: torch.dtype
) -> list[np.ndarray]:
    """Latents [B, C, T, h, w] to uint8 videos [num_frames, H, W, 3].

    Args:
        ae: autoencoder on ``device``.
        latents: any dtype, on any device.
        frames: which frames of the decoded video to keep.
        device: where to work.
        dtype: of the autoencoder.

    Raises:
        DecodeMemoryError: neither at once nor in tiles is there memory for it.
    """
    videos = []
    for latent in latents.split(1):
        try:
            pixels = _decode_or_tile(ae, latent.to(device, dtype))
        except torch.OutOfMemoryError as error:
            raise DecodeMemoryError(
                "not enough memory to decode, even in tiles; free memory on the device, or try --offload True or a "
                "smaller --ae.sample_size",
                latents.float().cpu(),
                frames,
            ) from error
        videos.append(to_uint8(pixels[0][:, frames]))
    return videos


def _decode_or_tile(ae: Any, latent: Tensor) -> Tensor:
    try:
        return ae.decode(latent)
    except torch.OutOfMemoryError:
        logger.warning("not enough memory to decode at once, trying in tiles")
    if latent.is_cuda:
        torch.cuda.empty_cache()
    with building.tiled(ae):
        return ae.decode(latent)


def decode_files(
    cfg: Mapping[str, Any], files: Sequence[str | Path], device: torch.device, log: Callable[[str], None] = print
) -> list[Path]:
    """Turn latents kept by ``save_latents`` into videos beside them; only the autoencoder is loaded.

    Args:
        cfg: resolved config (:class:`opensora.schema.InferenceOptions`); its section ``ae`` is used.
        files: ``*.latents.safetensors``.
        device: where to work.
        log: gets a line per saved file.

    Returns:
        The videos and images.

    Raises:
        UserError: a missing or foreign file, weights that are not there, or a video that is there already.
    """
    kept = [(Path(file), *read_latents(file)) for file in files]
    kept = [entry for entry in kept if _is_wanted(cfg, _stem_of(entry[0]))]
    if not kept:
        return []
    if not cfg["ae"]:
        raise UserError("the config has no section `ae`")
    building.check_weights("ae", cfg["ae"])
    dtype = building.torch_dtype(cfg["dtype"])
    ae = building.build_ready(cfg["ae"], device, dtype, "ae")
    made = []
    for path, latents, facts in kept:
        frames = slice(int(facts["first_frame"]), int(facts["end_frame"]))
        with on_device(ae, device, offload=False):
            (video,) = decode_latents(ae, latents[None], frames, device, dtype)
        made.append(outputs.save_sample(video, _stem_of(path), float(facts["fps"])))
        log(f"saved {made[-1]}")
    return made


def _stem_of(latents: Path) -> Path:
    return latents.with_name(latents.name.removesuffix(outputs.LATENTS_ENDING))


def _is_wanted(cfg: Mapping[str, Any], stem: Path) -> bool:
    """Whether a video is to be made; what is there is never replaced without being told to."""
    if cfg["overwrite"] or not outputs.has_video(stem):
        return True
    if cfg["skip_existing"]:
        return False
    raise UserError(
        f"the video of {stem} is there already: --skip-existing True decodes only what is missing, --overwrite True "
        "replaces it"
    )


def read_latents(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """Latents [C, T, h, w] of one sample, and what was recorded with them.

    Raises:
        UserError: missing, or not written by ``save_latents``.
    """
    if not Path(path).is_file():
        raise UserError(f"latents not found: {path}")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            latents = file.get_tensor("latents")
    except SafetensorError as error:
        raise UserError(f"{path}: not a file of latents ({error})") from error
    if not {"fps", "first_frame", "end_frame"} <= facts.keys() or latents.ndim != 4:
        raise UserError(f"{path}: not a file of latents that --save-latents True wrote")
    return latents, facts
