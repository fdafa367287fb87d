"""Kept latents to video files (``scripts/diffusion/decode.py``)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.acceleration.devices import torch_dtype
from opensora.config.commands import InferenceOptions
from opensora.diffusion.decode import room_to_work
from opensora.diffusion.kept_pixels import KeptRegion, decode_keeping
from opensora.generation import outputs
from opensora.generation.sample_files import SampleFiles
from opensora.models.autoencoder import as_autoencoder
from opensora.models.build import build_ready, check_weights
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.main import doing
from opensora.utils.sizes import parse_bytes


def decode_files(
    cfg: InferenceOptions, files: Sequence[str | Path], device: torch.device, log: Callable[[str], None] = print
) -> list[Path]:
    """Turn latents kept by ``save_latents`` into videos beside them; only the autoencoder is loaded.

    Args:
        cfg: resolved config; its section ``ae`` is used.
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
    if cfg.ae is None:
        raise UserError(f"{cfg.config_path}: the config has no section `ae`")
    check_weights("ae", cfg.ae)
    dtype = torch_dtype(cfg.dtype)
    ae = build_ready(cfg.ae, device, dtype, "ae")
    made, limit = [], parse_bytes(cfg.gpu_memory, "gpu_memory")
    for path, latents, facts in kept:
        frames = slice(int(facts["first_frame"]), int(facts["end_frame"]))
        with (
            claimed(_stem_of(path), is_folder=False, wait=cfg.wait, advice="--wait True waits for it"),
            doing(str(path)),
        ):
            if not _is_wanted(cfg, _stem_of(path)):  # another process was quicker
                continue
            with SampleFiles([(_stem_of(path), float(facts["fps"]))]) as frames_to:
                room = room_to_work(device, limit)
                window = int(facts["window"]) if "window" in facts else None
                of_region = [read_kept(path)]
                where = (frames, device, dtype, room, window)
                decode_keeping(frames_to, as_autoencoder(ae), latents[None], of_region, *where)
                made.append(frames_to.put_in_place(0))
        log(f"saved {made[-1]}")
    return made


def _stem_of(latents: Path) -> Path:
    return latents.with_name(latents.name.removesuffix(outputs.LATENTS_ENDING))


def _is_wanted(cfg: InferenceOptions, stem: Path) -> bool:
    """Whether a video is to be made; what is there is never replaced without being told to."""
    if cfg.overwrite or not outputs.has_video(stem):
        return True
    if cfg.skip_existing:
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


def read_kept(path: str | Path) -> KeptRegion | None:
    """What was kept of a region, from a file that :func:`read_latents` has read; None where none was."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        if "kept_latents" not in names:
            return None
        return KeptRegion(file.get_tensor("kept_latents"), file.get_tensor("kept_cells"))
