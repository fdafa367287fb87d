"""Videos of fixed prompts on the way: the curve that a person can judge."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora.acceleration.collectives import gather_values, to_first
from opensora.acceleration.parallel_context import Axis
from opensora.config import load_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.config.options import TrainSampleOptions
from opensora.diffusion.distilled import Distilled, as_distilled
from opensora.diffusion.finite import NotFiniteError
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.training.diffusion.inputs import InputEncoder
from opensora.training.diffusion.sharing import own_rows
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

    Data-parallel ranks divide the prompts among them, and the first rank writes and logs what they make. Each of them
    makes as many videos of the same kind, since weights may be divided over them: what is made twice is dropped.

    Args:
        section: ``samples`` of the training config.
        config: what `sampling_config` made of it.
        weights: of the model.
        encode: has the other models; its autoencoder still has the decoder.
        ema: shown instead of the model's own weights, where the section says so.
        folder: experiment folder; videos go to ``samples/step{N}``.
        run: device, dtype and processes.
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
        folder: Path,
        run: Run,
        log: MetricLog,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.section, self.weights, self.log, self.parallel = section, weights, log, run.parallel
        self.ema = ema if section.use_ema else None
        self.folder = folder / "samples"
        models: dict[str, Any] = {"model": weights.model, "ae": encode.ae, "t5": encode.t5, "clip": encode.clip}
        distilled, plain = Distilled.of(metadata or {}, "training"), config.sampling_option
        if distilled is not None:
            config = replace(config, sampling_option=as_distilled(plain, distilled))
        self.pipeline = VideoPipeline(models, config, run.device, run.dtype, distilled=distilled, plain=plain)
        # how often blocks run, and so their weights are put together, may then depend on the video
        alike = run.cfg.plugin == "fsdp2" and section.sampling_option.step_cache is not None
        self.rounds = sample_rounds([bool(self._ref(n)) for n in range(len(section.prompts))],
                                    1 if alike else self.parallel.dp.size)  # fmt: skip

    def _ref(self, number: int) -> Any:
        return self.section.refs[number] if self.section.refs else None

    def after_step(self, step: int) -> None:
        if step % self.section.every:
            return
        with self.ema.shown(self.weights) if self.ema is not None else nullcontext():
            self.make(step)

    def make(self, step: int) -> list[Path]:
        """Write and log a video (a picture, if it has one frame) per prompt; returns the files, on the first rank."""
        model = self.pipeline.models["model"]
        was_training = model.training
        model.eval()
        made: dict[int, Path] = {}
        done: set[int] = set()
        for numbers in self.rounds:
            number = numbers[self.parallel.dp.rank % len(numbers)]
            frames, problem = self._sample(number)
            for other, theirs in self._from_all_ranks(number, frames, problem, done, step):
                made[other] = self._keep(other, theirs, step)
        model.train(was_training)
        logger.info("step %d: %d samples in %s", step, len(made), self.folder / f"step{step:07d}")
        return [made[number] for number in sorted(made)]

    def _sample(self, number: int) -> tuple[np.ndarray, str]:
        """Frames of a prompt; none of them, and why, if they are not finite."""
        try:
            prompt = self.section.prompts[number]
            return self.pipeline(prompt, ref=self._ref(number), seed=self.section.seed).frames[0], ""
        except NotFiniteError as error:  # whether training can go on is not for its samples to say
            return np.empty((0, 0, 0, 3), dtype=np.uint8), str(error)

    def _from_all_ranks(
        self, number: int, frames: np.ndarray, problem: str, done: set[int], step: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the ranks have made in a round, on the first of them, one video at a time; no number twice."""
        ranks, device = self.parallel.dp, self.parallel.device
        if not self.parallel.sample.first:  # has made the same as the first that it works with
            return
        for source, (other, shape, why) in enumerate(gather_values((number, frames.shape, problem), ranks)):
            if other in done:
                continue
            done.add(other)
            if why:
                logger.warning("step %d: no sample of %r: %s", step, self.section.prompts[other], why)
                continue
            own = source == ranks.rank or not ranks.first
            video = torch.from_numpy(frames) if own else torch.empty(shape, dtype=torch.uint8)
            video = video if source == 0 else to_first(video.to(device), ranks, source)
            if ranks.first:
                yield other, video.cpu().numpy()

    def _keep(self, number: int, frames: np.ndarray, step: int) -> Path:
        """Write a video and give it to the log."""
        stem = self.folder / f"step{step:07d}" / f"{number:04d}"
        if len(frames) == 1:
            path = save_image(frames[0], stem.with_suffix(".png"))
        else:
            path = save_video(frames, stem.with_suffix(".mp4"), self.section.fps)
        write_text(self.section.prompts[number], stem.with_suffix(".txt"))
        self.log.video(f"sample/{number:04d}", frames, path, self.section.fps, step)
        return path

    def close(self) -> None:
        """Nothing is held."""


def sample_rounds(with_reference: Sequence[bool], ranks: int) -> list[list[int]]:
    """Which prompt each rank takes, round by round: all take as many, and in a round all or none have a reference,
    which takes more forward passes."""
    rounds = []
    for kind in (True, False):
        numbers = [number for number, given in enumerate(with_reference) if given == kind]
        shares = [own_rows(len(numbers), Axis(ranks, rank)) for rank in range(ranks)] if numbers else []
        rounds += [[numbers[place] for place in places] for places in zip(*shares)]
    return rounds
