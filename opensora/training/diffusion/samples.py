"""Videos of fixed prompts on the way: the curve that a person can judge."""

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opensora.config import load_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.config.options import TrainSampleOptions
from opensora.diffusion.distilled import Distilled, as_distilled
from opensora.diffusion.finite import NotFiniteError
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.training.diffusion.inputs import InputEncoder
from opensora.training.report.metrics import MetricLog
from opensora.training.run import Run
from opensora.training.weights.adapters import TrainedWeights
from opensora.training.weights.ema import EMA
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.logging import get_logger
from opensora.utils.video import save_image, save_video

logger = get_logger(__name__)


def sampling_config(cfg: TrainOptions) -> InferenceOptions:
    """The inference config that the section ``samples`` of a training config stands for.

    Raises:
        UserError: sizes, lengths or conditions that cannot be; names the section.
    """
    section = cfg.samples
    assert section is not None
    if not section.prompts:
        raise UserError("samples.prompts is empty: give a list of texts, or leave the section samples out")
    if section.refs is not None and len(section.refs) != len(section.prompts):
        raise UserError(f"samples: {len(section.refs)} refs for {len(section.prompts)} prompts")
    models = {"model": cfg.model, "ae": cfg.ae, "t5": cfg.t5, "clip": cfg.clip}
    content = {
        **{name: model.to_dict() for name, model in models.items() if model is not None},
        "dtype": cfg.dtype,
        "patch_size": cfg.patch_size,
        "cond_type": section.cond_type,
        "fps_save": section.fps,
        "sampling_option": section.sampling_option.to_dict(),
        "precompute": False,  # engines divide weights block by block: layers must run within theirs
    }
    try:
        resolved = load_config(content, InferenceOptions)
        PreparedRun.of(resolved, torch.device("cpu"))  # for its checks of sizes; where it will work is known elsewhere
    except UserError as error:
        raise UserError(f"samples: {error}") from error
    return resolved


class SamplesHook:
    """Makes the videos every so many optimizer steps, with the models of the training run.

    Args:
        section: ``samples`` of the training config.
        config: what `sampling_config` made of it.
        weights: of the model.
        encode: has the other models; its autoencoder still has the decoder.
        ema: shown instead of the model's own weights, where the section says so.
        folder: experiment folder; videos go to ``samples/step{N}``. None for ranks that take part and keep nothing.
        run: device and dtype of the models.
        log: gets the videos.
        metadata: what the training method records in weight files, which may say how the model is to be sampled.
    """

    def __init__(
        self,
        section: TrainSampleOptions,
        config: InferenceOptions,
        weights: TrainedWeights,
        encode: InputEncoder,
        ema: EMA | None,
        folder: Path | None,
        run: Run,
        log: MetricLog,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.section, self.weights, self.log = section, weights, log
        self.ema = ema if section.use_ema else None
        self._scratch = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = Path(self._scratch.name if self._scratch is not None else str(folder)) / "samples"
        models: dict[str, Any] = {"model": weights.model, "ae": encode.ae, "t5": encode.t5, "clip": encode.clip}
        distilled, plain = Distilled.of(metadata or {}, "training"), config.sampling_option
        if distilled is not None:
            config = replace(config, sampling_option=as_distilled(plain, distilled))
        self.pipeline = VideoPipeline(models, config, run.device, run.dtype, distilled=distilled, plain=plain)

    def after_step(self, step: int) -> None:
        if step % self.section.every:
            return
        with self.ema.shown(self.weights) if self.ema is not None else nullcontext():
            self.make(step)

    def make(self, step: int) -> list[Path]:
        """Write and log a video (a picture, if it has one frame) per prompt; returns the files."""
        section, model = self.section, self.pipeline.models["model"]
        was_training = model.training
        model.eval()
        paths = []
        for number, prompt in enumerate(section.prompts):
            ref = section.refs[number] if section.refs else None
            try:
                frames = self.pipeline(prompt, ref=ref, seed=section.seed).frames[0]
            except NotFiniteError as error:  # whether training can go on is not for its samples to say
                logger.warning("step %d: no sample of %r: %s", step, prompt, error)
                continue
            stem = self.folder / f"step{step:07d}" / f"{number:04d}"
            if len(frames) == 1:
                path = save_image(frames[0], stem.with_suffix(".png"))
            else:
                path = save_video(frames, stem.with_suffix(".mp4"), section.fps)
            write_text(prompt, stem.with_suffix(".txt"))
            self.log.video(f"sample/{number:04d}", frames, path, section.fps, step)
            paths.append(path)
        model.train(was_training)
        logger.info("step %d: %d samples in %s", step, len(paths), self.folder / f"step{step:07d}")
        return paths

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
