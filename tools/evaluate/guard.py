"""What guards the demo's quality: its first training steps, videos that it makes, and what its model costs.

Each is computed anew and compared with what is kept in ``tests/golden/demo``; see ``goldens.py``.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opensora.config import parse_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.evaluation.quality import ssim
from opensora.models.build import build_ready
from opensora.utils.video import read_image
from tools.demo.scoring import Verdict, judge
from tools.demo.world import NUM_FRAMES, SIZE, Combination

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "demo"
CONFIG, TRAIN_CONFIG = "configs/diffusion/inference/demo.py", "configs/diffusion/train/demo_cpu.py"

STEPS, BATCH, CLIPS, CLIP_SEED = 32, 1, 16, 7
# The same code repeats losses to the last bit on one processor. Other instruction sets round otherwise: without AVX
# (ATEN_CPU_CAPABILITY=default), no loss was off by more than 0.004 %.
STEP_TOLERANCE, MEAN_TOLERANCE = 0.005, 0.001
MIN_SSIM = 0.98
WORSE = 1.25  # cost or time that fails
ROUNDS = 40  # of timing
_aten = torch.ops.aten
PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten._scaled_dot_product_flash_attention_for_cpu)

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Golden:
    """A video that the demo makes right: what it shows, and the seed."""

    combination: Combination
    background: str
    seed: int

    @property
    def prompt(self) -> str:
        """As the demo's own measurements word it."""
        from tools.demo.captions import plain_caption

        return plain_caption(self.combination, self.background)

    @property
    def file(self) -> Path:
        """Where its frames are kept, side by side."""
        return GOLDEN / f"{'_'.join(self.combination)}_{self.background}_{self.seed}.png"


VIDEOS = (
    Golden(Combination("blue", "square", "still"), "light", 1065),
    Golden(Combination("green", "triangle", "down"), "light", 1013),
    Golden(Combination("purple", "triangle", "right"), "light", 1041),
)


# ----------------------------------------------------------------------------------------------------------- training


def first_losses(folder: Path) -> list[float]:
    """Losses of the first steps of the demo's recipe, on few clips and small batches.

    Args:
        folder: an empty one, for clips and the experiment.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from opensora.training.diffusion.trainer import Trainer
    from tools.demo.make_clips import make_clip

    (folder / "clips").mkdir(parents=True)
    rows = [make_clip(index, folder, CLIP_SEED, "train") for index in range(CLIPS)]
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    words = ["--dataset.data-path", str(folder / "clips.csv"), "--max-steps", str(STEPS), "--log-every", "1"]
    words += ["--bucket_config", str({"64px_ar1:1": {NUM_FRAMES: (1.0, BATCH)}}), "--ckpt-every", "0"]
    words += ["--outputs", str(folder / "outputs"), "--exp-name", "golden", "--device", "cpu"]
    done = Trainer(parse_config([TRAIN_CONFIG, *words], TrainOptions)).run()
    events = EventAccumulator(str(done / "tensorboard")).Reload()
    return [round(float(event.value), 5) for event in events.Scalars("loss")]


def compare_losses(kept: Sequence[float], found: Sequence[float]) -> list[str]:
    """What is wrong with a curve, in words."""
    if len(kept) != len(found):
        return [f"loss: {len(found)} steps, {len(kept)} are kept"]
    a, b = np.array(kept), np.array(found)
    relative = np.abs(b - a) / np.abs(a)
    wrong = []
    if relative.max() > STEP_TOLERANCE:
        step = int(np.argmax(relative > STEP_TOLERANCE))
        wrong.append(
            f"loss: {b[step]:.4f} at step {step + 1}, {a[step]:.4f} is kept ({100 * STEP_TOLERANCE:g} % may differ)"
        )
    if abs(b.mean() - a.mean()) > MEAN_TOLERANCE * a.mean():
        wrong.append(f"loss: mean {b.mean():.4f}, {a.mean():.4f} is kept ({100 * MEAN_TOLERANCE:g} % may differ)")
    return wrong


# ------------------------------------------------------------------------------------------------------------- videos


def make_videos(pipe: VideoPipeline) -> list[Frames]:
    """The golden videos, made anew."""
    result = pipe([video.prompt for video in VIDEOS], seed=[video.seed for video in VIDEOS])
    return list(result.frames)


def judged(frames: Sequence[Frames]) -> list[Verdict]:
    """What the demo's judge says of the golden videos."""
    return [judge(clip, video.combination, video.background) for clip, video in zip(frames, VIDEOS, strict=True)]


def side_by_side(frames: Frames) -> Frames:
    """Frames ``[T, H, W, 3]`` as one picture ``[H, T W, 3]``."""
    return np.ascontiguousarray(np.concatenate(list(frames), axis=1))


def kept_video(video: Golden) -> Frames:
    """Frames ``[T, H, W, 3]`` of a golden video as they are kept."""
    picture = read_image(video.file)
    return np.stack(np.split(picture, picture.shape[1] // SIZE, axis=1))


def compare_videos(frames: Sequence[Frames]) -> list[str]:
    """What is wrong with videos, in words: unlike what is kept, or not what the prompt says."""
    wrong = []
    for clip, video, verdict in zip(frames, VIDEOS, judged(frames), strict=True):
        alike = ssim(kept_video(video), clip)
        if alike < MIN_SSIM:
            wrong.append(f"video {video.file.name}: SSIM {alike:.4f} to what is kept, {MIN_SSIM} is the least")
        if not verdict.right["all"]:
            wrong.append(f"video {video.file.name}: {verdict.label}")
    return wrong


# --------------------------------------------------------------------------------------------------------------- cost


class OpCounter(TorchDispatchMode):
    """Counts what reaches the kernels: operations, and bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it; views cost nothing."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.ops += 1
            found = result if isinstance(result, tuple | list) else [result]
            self.bytes += sum(part.numel() * part.element_size() for part in found if isinstance(part, torch.Tensor))
        return result


def demo_model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The demo's model, and inputs of one sampling step (two guidance branches, 80 image and 24 text tokens)."""
    cfg = parse_config([CONFIG, "--device", "cpu"], InferenceOptions)
    assert cfg.model is not None
    torch.manual_seed(0)
    model = build_ready(cfg.model, torch.device("cpu"), torch.float32).requires_grad_(True)
    batch, image, text = 2, 5 * 4 * 4, 24
    inputs = {
        "img": torch.randn(batch, image, 32),
        "img_ids": torch.zeros(batch, image, 3),
        "txt": torch.randn(batch, text, 64),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.full((batch,), 0.5),
        "y_vec": torch.randn(batch, 64),
        "cond": torch.zeros(batch, image, 36),
    }
    return model, inputs


def cost(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Floating-point operations, kernel calls and bytes written of a forward pass, and of one with its backward.

    These are the same on every machine, busy or not.
    """
    found: dict[str, int] = {}
    for name, with_backward in (("forward", False), ("training", True)):
        flops, ops = FlopCounterMode(display=False), OpCounter()
        with torch.set_grad_enabled(with_backward), flops, ops:
            out = model(**inputs)
            if with_backward:
                out.square().mean().backward()
        model.zero_grad(set_to_none=True)
        found |= {f"{name} flops": flops.get_total_flops(), f"{name} calls": ops.ops, f"{name} bytes": ops.bytes}
    return found


def compare_cost(kept: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """What became dearer by a quarter or more, in words."""
    return [
        f"{name}: {found[name]:,.4g}, {value:,.4g} is kept ({found[name] / value:.2f} times)"
        for name, value in kept.items()
        if found[name] >= WORSE * value
    ]


class ProductRecorder(TorchDispatchMode):
    """Keeps the matrix products and attentions that reach the kernels, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note how to run it again if it is a product."""
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append(partial(func, *args, **kwargs))
        return func(*args, **kwargs)


@torch.no_grad()
def relative_time(model: nn.Module, inputs: Mapping[str, torch.Tensor], rounds: int = ROUNDS) -> float:
    """Time of a forward pass over that of its matrix products and attentions alone.

    Both take turns on one thread, each timed by the processor's own clock for that thread; the shortest time of each
    counts, the one that was least disturbed. What shares caches and memory slows both alike, as both read and multiply
    the same. That there are no more products than there were is what `cost` guards. It depends on the processor.
    """
    recorder = ProductRecorder()
    with recorder:
        model(**inputs)

    def products() -> None:
        for call in recorder.calls:
            call()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [(_seconds(lambda: model(**inputs)), _seconds(products)) for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return min(whole for whole, _ in times) / min(part for _, part in times)


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return max(time.thread_time() - start, 1e-9)


def processor() -> str:
    """Name of this machine's processor, which times are kept for."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    said: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    parts = [said.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
    return "/".join(parts) if any(parts) else platform.processor() or "unknown"


def read_kept(name: str) -> Any:
    """One of the kept tables, None where there is none."""
    path = GOLDEN / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
