"""Reconstructing clips with an autoencoder: files to look at, measures per clip, and what they come to."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.config.commands import VaeInferenceOptions
from opensora.config.options import ModelOptions
from opensora.datasets.sharing import SharingLoader, unchanged
from opensora.datasets.source import ClipSource
from opensora.datasets.table import write_table
from opensora.evaluation.clips import ClipReader, EvalClip, choose_clips, own_source
from opensora.evaluation.latents import RunningMoments
from opensora.evaluation.quality import flicker, psnr, ssim
from opensora.models.autoencoder import as_autoencoder
from opensora.models.build import build_on_meta, build_ready, check_weights
from opensora.models.vae.lpips import build_lpips, check_lpips
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError, shorten
from opensora.utils.files import remove_unfinished_files, write_text
from opensora.utils.logging import get_logger
from opensora.utils.main import doing
from opensora.utils.progress import Bar
from opensora.utils.video import contact_sheet, read_image, read_video, save_image, save_video, to_uint8
from opensora.utils.weights import fingerprint

logger = get_logger(__name__)

MEASURES = ("psnr", "ssim", "lpips", "flicker", "latent_mean", "latent_std")
CRF = 17  # of the files: near to lossless, since they are there to judge fine differences
LPIPS_FRAMES = 16  # at a time
SHEET_FRAMES = 5
RESULTS = ("clips", "orig", "recn", "side_by_side", "metrics.csv", "overall.csv", "latents.csv", "sheet.png")
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Results:
    """Where the results of a clip lie below ``folder``."""

    folder: Path

    @property
    def settings(self) -> Path:
        """Weights and settings that all results in the folder are of."""
        return self.folder / "settings.json"

    def metrics(self, clip: EvalClip) -> Path:
        """Measures of a clip; written last, so that a clip that has them is finished."""
        return self.folder / "clips" / f"{clip.name}.json"

    def pictures(self, clip: EvalClip) -> tuple[Path, Path, Path]:
        """Original, reconstruction, and both side by side."""
        suffix = ".mp4" if clip.num_frames > 1 else ".png"
        return (
            self.folder / "orig" / f"{clip.name}_orig{suffix}",
            self.folder / "recn" / f"{clip.name}_recn{suffix}",
            self.folder / "side_by_side" / f"{clip.name}{suffix}",
        )

    def read(self, clip: EvalClip) -> dict[str, Any] | None:
        """Measures of a finished clip of the same size, None for any other."""
        path = self.metrics(clip)
        if not path.is_file() or not all(picture.is_file() for picture in self.pictures(clip)):
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # a disk that was full or lost power: the clip is done again
            return None
        return found if _same(found["clip"], clip) else None


def _same(found: Mapping[str, Any], clip: EvalClip) -> bool:
    """Whether measures are of this clip at this size (the rate of a picture, NaN, never equals itself)."""
    own = asdict(clip)
    return all(
        found.get(key) == value for key, value in own.items() if not (isinstance(value, float) and math.isnan(value))
    )


def measure(
    original: Tensor, reconstruction: Tensor, z: Tensor, lpips: nn.Module | None
) -> tuple[dict[str, float], tuple[Frames, Frames]]:
    """Measures of one clip, on the 8-bit pixels that are saved, and those pixels.

    Args:
        original, reconstruction: ``[3, T, H, W]``, original in [-1, 1].
        z: latents ``[1, C, t, h, w]``.
        lpips: the perceptual distance, None to leave it out.

    Returns:
        the measures and (original, reconstruction) as uint8 ``[T, H, W, 3]``.
    """
    frames = min(original.shape[1], reconstruction.shape[1])
    first, second = to_uint8(original[:, :frames]), to_uint8(reconstruction[:, :frames])
    values = {"psnr": psnr(first, second), "ssim": ssim(first, second)}
    if lpips is not None:
        values["lpips"] = _perceptual(first, second, lpips, z.device)
    exact = z.double()
    std = float(exact.std(unbiased=False))
    values |= {"flicker": flicker(first, second), "latent_mean": float(exact.mean()), "latent_std": std}
    return values, (first, second)


def _perceptual(first: Frames, second: Frames, lpips: nn.Module, device: torch.device) -> float:
    total = 0.0
    for start in range(0, len(first), LPIPS_FRAMES):
        pair = (
            torch.from_numpy(frames[start : start + LPIPS_FRAMES]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            for frames in (first, second)
        )
        total += float(lpips(*pair).double().sum())
    return total / len(first)


@torch.no_grad()
def reconstruct(cfg: VaeInferenceOptions) -> Path:
    """Reconstruct the clips of a config into ``save_dir``; clips finished by an earlier call are left as they are.

    Writes ``orig/``, ``recn/`` and ``side_by_side/`` (videos, pictures for single frames), ``metrics.csv`` (a row per
    clip), ``overall.csv``, ``latents.csv`` (per channel) and ``sheet.png``, and prints the overall table.

    Args:
        cfg: resolved config (``VaeInferenceOptions``).

    Raises:
        UserError: anything wrong with config, weights, clips or folder, before the model is built.
    """
    with claimed(Path(cfg.save_dir), wait=cfg.wait, advice="--wait True waits for it"):
        return _reconstruct(cfg)


def _reconstruct(cfg: VaeInferenceOptions) -> Path:
    device = pick_device(cfg.device)
    reader, results, settings = prepare(cfg)
    clips = reader.clips
    remove_unfinished_files(results.folder)
    waiting = [clip for clip in clips if results.read(clip) is None]
    logger.info("%d clips, %d of them done before, to %s", len(clips), len(clips) - len(waiting), results.folder)
    if waiting:
        assert cfg.model is not None
        model: Any = build_ready(cfg.model, device, torch_dtype(cfg.dtype))
        lpips = build_lpips(cfg.lpips, device) if cfg.lpips else None
        write_text(settings, results.settings)  # only now: weights that cannot be loaded must not claim the folder
        for clip, video in _read_ahead(ClipReader(waiting, reader.source), cfg):
            with doing(f"clip {clip.path}"):
                _reconstruct_clip(clip, video.to(device), model, lpips, results, _played_fps(cfg))
    summarise(clips, results, cfg.sheet_clips)
    return results.folder


def prepare(cfg: VaeInferenceOptions) -> tuple[ClipReader, Results, str]:
    """Check everything that can be checked without a model.

    Returns:
        The clips, where their results go, and what the folder's settings must be.
    """
    if cfg.model is None:
        raise UserError(f"{cfg.config_path}: 'model' is missing; give the autoencoder")
    check_weights("model", cfg.model)
    if cfg.lpips:
        check_lpips(cfg.lpips)
    source = own_source(cfg)
    reader = ClipReader(choose_clips(cfg, as_autoencoder(build_on_meta(cfg.model)), source), source)
    results = Results(Path(cfg.save_dir))
    text, older = (_settings_text(cfg, stamp, source) for stamp in (_fingerprint(cfg.model), _file_stamp(cfg.model)))
    path = results.settings
    if not path.is_file() and (foreign := [name for name in RESULTS if (results.folder / name).exists()]):
        raise UserError(
            f"save_dir={cfg.save_dir} holds {shorten(foreign)}, but no results of this program ({path.name} is "
            "missing); give another --save-dir"
        )
    if path.is_file() and path.read_text(encoding="utf-8") not in (text, older):
        raise UserError(
            f"save_dir={cfg.save_dir} holds results of other weights or settings ({path}); give another --save-dir"
        )
    return reader, results, text


def _played_fps(cfg: VaeInferenceOptions) -> int:
    """Frame rate of the files: clips of which every n-th frame is taken last as long as before."""
    return max(cfg.fps // cfg.frame_interval, 1)


def _settings_text(cfg: VaeInferenceOptions, weights: Any, source: ClipSource | None) -> str:
    """What results depend on besides the clip, as the folder's ``settings.json`` has it."""
    lpips = cfg.lpips.to_dict() if cfg.lpips else None
    assert cfg.model is not None
    settings = {"model": cfg.model.to_dict(), "dtype": cfg.dtype, "lpips": lpips, "weights": weights}
    settings["fps"] = _played_fps(cfg)
    if source is not None:
        assert cfg.dataset is not None
        settings["dataset"] = (
            cfg.dataset.to_dict()
        )  # its clips need not be files, whose times would tell that they changed
    return json.dumps(settings, indent=4, default=str) + "\n"


def _fingerprint(section: ModelOptions) -> str | None:
    """Identifies the weights, to notice that they were replaced; None for random ones."""
    path = section.from_pretrained
    return fingerprint(path, section.cache_dir) if path else None


def _file_stamp(section: ModelOptions) -> list[Any] | None:
    """What version 2.1.0 recorded in place of a fingerprint: size and time of the weight file."""
    path = Path(section.from_pretrained or "")
    return [path.stat().st_size, path.stat().st_mtime] if path.is_file() else None


def _read_ahead(reader: ClipReader, cfg: VaeInferenceOptions) -> Iterator[tuple[EvalClip, Tensor]]:
    """Readable clips in order, with a progress bar; others are left out."""
    loader = SharingLoader(
        reader,
        unchanged,
        batch_size=None,
        num_workers=cfg.num_workers,
        prefetch_factor=(cfg.prefetch_factor or 2) if cfg.num_workers else None,
    )
    pairs = zip(reader.clips, loader)
    for clip, video in Bar(pairs, total=len(reader), unit="clip", desc="reconstructing", disable=cfg.verbose == 0):
        if video is not None:
            yield clip, video


def _reconstruct_clip(
    clip: EvalClip, video: Tensor, model: Any, lpips: nn.Module | None, results: Results, fps: int
) -> None:
    z = model.encode(video[None].to(next(model.parameters()).dtype), sample_posterior=False)
    values, (first, second) = measure(video, model.decode(z)[0], z, lpips)
    moments = RunningMoments()
    moments.add(z)
    both = np.concatenate([first, second], axis=2)
    for frames, path in zip((first, second, both), results.pictures(clip)):
        if clip.num_frames > 1:
            save_video(frames, path, fps, CRF)
        else:
            save_image(frames[0], path)
    record = {"clip": asdict(clip), "frames": len(first), **values, "moments": moments.state()}
    write_text(json.dumps(record), results.metrics(clip))


def summarise(clips: list[EvalClip], results: Results, sheet_clips: int) -> None:
    """Write the tables and the sheet of all finished clips, and print the overall table.

    Raises:
        UserError: no clip is finished, since none could be read.
    """
    finished = [(clip, found) for clip in clips if (found := results.read(clip)) is not None]
    if not finished:
        raise UserError("none of the clips could be read; the log names the reasons")
    rows, moments = [], RunningMoments()
    for clip, found in finished:
        size = {"name": clip.name, "path": clip.path, "num_frames": found["frames"]}  # that came back
        size |= {"height": clip.height, "width": clip.width}
        rows.append({**size, **{key: found[key] for key in MEASURES if key in found}})
        moments.merge(found["moments"])
    table = pd.DataFrame(rows)
    write_table(table, results.folder / "metrics.csv")
    overall = overall_table(table)
    write_table(overall, results.folder / "overall.csv")
    channels = pd.DataFrame({"mean": moments.mean.tolist(), "std": moments.std.tolist()})
    write_table(channels.rename_axis("channel").reset_index(), results.folder / "latents.csv")
    if sheet_clips > 0:
        _draw_sheet(finished[:sheet_clips], results)
    print(overall.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    mean, std = moments.overall
    print(f"latents: mean {mean:.4f}, std {std:.4f} over all channels; per channel in latents.csv")


def overall_table(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, spread and range of every measure, for videos and for pictures: one row each.

    Args:
        table: one row per clip, with ``num_frames`` and the measures.
    """
    rows = []
    for kind, part in (("videos", table[table["num_frames"] > 1]), ("pictures", table[table["num_frames"] == 1])):
        for name in (name for name in MEASURES if name in part and part[name].notna().any()):
            values = part[name].dropna()
            rows.append(
                {
                    "kind": kind,
                    "measure": name,
                    "clips": len(values),
                    "mean": values.mean(),
                    "std": values.std(ddof=0),
                    "lowest": values.min(),
                    "highest": values.max(),
                }
            )
    return pd.DataFrame(rows)


def _draw_sheet(finished: list[tuple[EvalClip, dict[str, Any]]], results: Results) -> None:
    """Originals over their reconstructions, from the files."""
    pairs, labels = [], []
    for clip, found in finished:
        original, reconstruction, _ = results.pictures(clip)
        if clip.num_frames > 1:
            frames = [read_video(path)[0] for path in (original, reconstruction)]
        else:
            frames = [read_image(path)[None] for path in (original, reconstruction)]
        pairs.append(np.concatenate(frames, axis=1))
        labels.append(f"{clip.name}: {found['psnr']:.1f} dB, SSIM {found['ssim']:.3f}")
    contact_sheet(pairs, results.folder / "sheet.png", SHEET_FRAMES, labels, columns=2, gap=6)
