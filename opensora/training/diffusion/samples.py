"""Videos of fixed prompts on the way: the curve that a person can judge."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.checks import check_config
from opensora.diffusion.pipeline import VideoPipeline
from opensora.training.report.metrics import MetricLog
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.logging import get_logger
from opensora.utils.video import save_image, save_video

logger = get_logger(__name__)


def sampling_config(cfg: Any) -> Any:
    """The inference config that the section ``samples`` of a training config stands for.

    Raises:
        UserError: sizes, lengths or conditions that cannot be; names the section.
    """
    section = cfg.samples
    if not section["prompts"]:
        raise UserError("samples.prompts is empty: give a list of texts, or leave the section samples out")
    if section["refs"] is not None and len(section["refs"]) != len(section["prompts"]):
        raise UserError(f"samples: {len(section['refs'])} refs for {len(section['prompts'])} prompts")
    content = {
        **{name: dict(cfg[name]) for name in ("model", "ae", "t5", "clip")},
        "dtype": cfg.dtype,
        "patch_size": cfg.patch_size,
        "cond_type": section["cond_type"],
        "fps_save": section["fps"],
        "sampling_option": dict(section["sampling_option"]),
    }
    try:
        resolved = load_config(content, InferenceOptions)
        check_config(resolved)
    except UserError as error:
        raise UserError(f"samples: {error}") from error
    return resolved


class TrainSamples:
    """Makes the videos, with the models of the training run.

    Args:
        cfg: resolved training config with a section ``samples``.
        models: ``model``, ``ae`` (with its decoder), ``t5``, ``clip``.
        folder: experiment folder; videos go to ``samples/step{N}``.
        device: where the models are.
        dtype: of the models.
    """

    def __init__(
        self, cfg: Any, models: dict[str, nn.Module], folder: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.section, self.folder = cfg.samples, folder / "samples"
        self.every = self.section["every"]
        self.pipeline = VideoPipeline(models, sampling_config(cfg), device, dtype)

    def __call__(self, step: int, log: MetricLog) -> list[Path]:
        """Write and log a video (a picture, if it has one frame) per prompt; returns the files."""
        section, model = self.section, self.pipeline.models["model"]
        was_training = model.training
        model.eval()
        paths = []
        for number, prompt in enumerate(section["prompts"]):
            ref = section["refs"][number] if section["refs"] else None
            frames = self.pipeline(prompt, ref=ref, seed=section["seed"]).frames[0]
            stem = self.folder / f"step{step:07d}" / f"{number:04d}"
            if len(frames) == 1:
                path = save_image(frames[0], stem.with_suffix(".png"))
            else:
                path = save_video(frames, stem.with_suffix(".mp4"), section["fps"])
            write_text(prompt, stem.with_suffix(".txt"))
            log.video(f"sample/{number:04d}", frames, path, section["fps"], step)
            paths.append(path)
        model.train(was_training)
        logger.info("step %d: %d samples in %s", step, len(paths), self.folder / f"step{step:07d}")
        return paths
