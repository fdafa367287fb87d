"""What a sampling run will do: sizes, tokens, steps. Known from the config alone, before any weight is loaded."""

import itertools
import math
from dataclasses import dataclass, replace

from opensora.config.options import SamplingOption
from opensora.datasets.aspect import aspect_ratio_table, closest_aspect_ratio, get_image_size, round_up
from opensora.diffusion.conditions import fits, get_condition, get_spans, is_image_condition, takes_references
from opensora.diffusion.distilled import Distilled
from opensora.diffusion.flow import get_schedule, shifted
from opensora.diffusion.free import FreeCondition, Region
from opensora.diffusion.guidance import Guidance, count_forwards, phase
from opensora.diffusion.solvers import SOLVERS, Step, evaluations, make_steps
from opensora.diffusion.step_cache import StepCacheChoice
from opensora.diffusion.windows import CLIP, Windows
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError

SIZE_MULTIPLE = 16
IMAGE_GUIDANCE = 4.0  # of the guidance-distilled picture model


@dataclass(frozen=True)
class SamplePlan:
    """One sampling run; of a video in windows, the first of them.

    Attributes:
        height, width: pixels.
        num_frames: pixel frames made at once.
        spec: of the autoencoder.
        latent_size: (T, h, w).
        patch_size: latent pixels per token side.
        times: schedule, ``num_steps + 1`` values.
        cond_type: condition of all samples of the run.
        guidance: scales.
        has_image: whether any sample has references.
        drop_duplicates: leave out frames that only repeat a given picture (non-causal autoencoders).
        method: ``i2v`` weighs predictions with and without prompt and picture; ``distill`` tells the scales to a
            guidance-distilled model, or leaves them to one that has its own.
        solver: name in :data:`opensora.diffusion.solvers.SOLVERS`.
        step_cache: what reuses work between steps, or None.
        distilled: what the model says of itself, if it is distilled.
        windows: how a video that is longer than ``num_frames`` is divided, else None.
        after: run of each window but the first.
        keep_given: set what is given anew at every step.
    """

    height: int
    width: int
    num_frames: int
    spec: LatentSpec
    latent_size: tuple[int, int, int]
    patch_size: int
    times: tuple[float, ...]
    cond_type: str
    guidance: Guidance
    has_image: bool
    drop_duplicates: bool
    method: str
    solver: str
    step_cache: StepCacheChoice | None
    distilled: Distilled | None = None
    windows: Windows | None = None
    after: "SamplePlan | None" = None
    keep_given: bool = False

    @property
    def length(self) -> int:
        """Pixel frames of the whole video."""
        return self.num_frames if self.windows is None else self.windows.num_frames

    @property
    def whole_latent(self) -> tuple[int, int, int]:
        """Latent (T, h, w) of the whole video."""
        frames, rows, columns = self.latent_size
        return (frames if self.windows is None else self.windows.latent_frames), rows, columns

    @property
    def keeps_region(self) -> bool:
        """Whether a part of the picture is kept of a reference, which is encoded and decoded as it is, too."""
        return self.has_image and isinstance(get_condition(self.cond_type), Region)

    @property
    def tokens(self) -> int:
        """Image tokens of a sample, or of a window of it."""
        return math.prod(self.latent_size) // self.patch_size**2

    @property
    def num_steps(self) -> int:
        """Solver steps."""
        return len(self.times) - 1

    def steps(self) -> list[Step]:
        """What the solver is to do."""
        if self.method == "distill" and not self.tells_scales:
            return make_steps(self.times)
        phases = [phase(self.guidance, step, self.has_image) for step in range(self.num_steps)]
        return make_steps(self.times, phases)

    @property
    def tells_scales(self) -> bool:
        """Whether the model takes the scales of each step, text and image."""
        return self.distilled is not None and self.distilled.scales == "input" and self.method == "distill"

    @property
    def forwards(self) -> int:
        """Forwards of the guided model per sample, over all windows; with a step cache, some leave blocks out."""
        further = (self.windows.count - 1) * self.after.forwards if self.windows and self.after else 0
        return self._forwards + further

    @property
    def _forwards(self) -> int:
        evaluated = evaluations(SOLVERS.get(self.solver), self.steps())
        if self.method == "distill":
            return len(evaluated)
        return count_forwards(self.guidance, self.num_steps, self.has_image, evaluated)

    def kept_frames(self) -> slice:
        """Frames to keep of the decoded video.

        A non-causal autoencoder turns the latent of a given picture into a whole group of frames; only one of them is
        kept when ``drop_duplicates``.
        """
        extra = self.spec.compression[0] - 1
        if not self.drop_duplicates or self.length <= 2 * extra:
            return slice(0, self.length)
        ends = {span.at for span in get_spans(self.cond_type)}
        start = extra if "head" in ends else 0
        return slice(start, self.length - (extra if "tail" in ends else 0))


def frame_size(option: SamplingOption, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels that sampling options ask for, multiples of ``multiple``.

    Explicit ``height`` and ``width``, rounded up, go before ``resolution`` and ``aspect_ratio``.

    Raises:
        UserError: not one complete pair of them, or unknown names.
    """
    height, width = option.height, option.width
    resolution, ratio = option.resolution, option.aspect_ratio
    if (height is None) != (width is None):
        raise UserError("sampling_option: height and width must be given together")
    if height is not None and width is not None:
        return round_up(height, multiple), round_up(width, multiple)
    if resolution is None and ratio is None:
        raise UserError("sampling_option: give resolution and aspect_ratio (256px, 16:9), or height and width")
    if resolution is None or ratio is None:
        raise UserError("sampling_option: resolution and aspect_ratio must be given together")
    rows, columns = get_image_size(resolution, ratio, multiple)
    return round_up(rows, multiple), round_up(columns, multiple)


def make_plan(
    option: SamplingOption,
    spec: LatentSpec,
    patch_size: int,
    cond_type: str = "t2v",
    has_image: bool | None = None,
    distilled: Distilled | None = None,
) -> SamplePlan:
    """Work out a run.

    Args:
        option: sampling options.
        spec: of the autoencoder.
        patch_size: latent pixels per token side.
        cond_type: condition of the samples.
        has_image: whether any sample has references (default: whether ``cond_type`` takes any).
        distilled: what the model says of itself; ``option`` is already as it asks (see
            :func:`opensora.diffusion.distilled.as_distilled`).

    Raises:
        UserError: sizes, lengths, steps or conditions that cannot be; says what can.
    """
    windows = Windows.of(option, spec)
    if windows is None or option.window is None or not fits(cond_type, windows.window, spec.is_causal):
        return _plan_at_once(option, spec, patch_size, cond_type, has_image, distilled)
    if not in_windows(cond_type):
        fixed = "all frames" if isinstance(get_condition(cond_type), Region) else "the end"
        raise UserError(
            f"cond_type {cond_type} fixes {fixed} of a video, and num_frames={option.num_frames} is made in windows of "
            f"{option.window}, which takes conditions of the beginning only: t2v, i2v_head, v2v_head, extend_right; or "
            "frames, at any places"
        )
    option = replace(option, num_frames=option.window)
    after = _plan_at_once(option, spec, patch_size, "i2v_head", True, distilled)
    if windows.overlap > 1:  # a clip, to which guidance that grows from a picture does not apply
        after = replace(after, cond_type=CLIP, guidance=replace(after.guidance, scale_temporal_osci=False))
    first = _plan_at_once(option, spec, patch_size, cond_type, has_image, distilled)
    return replace(first, windows=windows, after=after)


def in_windows(cond_type: str) -> bool:
    """Whether a condition can be of a video that is made in windows: it gives no end, and not all frames."""
    condition = get_condition(cond_type)
    if isinstance(condition, FreeCondition):
        return condition.in_windows
    return not any(span.at == "tail" for span in condition)


def _plan_at_once(
    option: SamplingOption,
    spec: LatentSpec,
    patch_size: int,
    cond_type: str,
    has_image: bool | None,
    distilled: Distilled | None,
) -> SamplePlan:
    """A run of ``num_frames`` frames together; see :func:`make_plan`."""
    multiple = math.lcm(SIZE_MULTIPLE, spec.compression[1] * patch_size, spec.compression[2] * patch_size)
    height, width = frame_size(option, multiple)
    num_frames, num_steps = option.num_frames, option.num_steps
    spec.check_frames(num_frames)
    if option.method == "distill" and distilled is None and takes_references(cond_type):
        raise UserError(
            f"sampling_option.method distill makes videos from text alone, not with cond_type {cond_type} (or "
            "use_t2i2v); --sampling_option.method i2v takes references"
        )
    size = spec.latent_size(num_frames, height, width)
    _check_condition(cond_type, num_frames, size[0], spec)
    tokens = size[1] * size[2] // patch_size**2
    if distilled is not None and distilled.positions is not None and distilled.num_steps == num_steps:
        times = shifted(distilled.positions, tokens, size[0], option.shift, option.flow_shift)
    else:
        times = get_schedule(num_steps, tokens, size[0], option.shift, option.flow_shift)
    if any(after >= now for now, after in itertools.pairwise(times)):
        raise UserError(f"flow_shift={option.flow_shift}: the times of {num_steps} steps coincide; 1 to 20 is usual")
    given = takes_references(cond_type) if has_image is None else has_image
    return SamplePlan(
        height=height,
        width=width,
        num_frames=num_frames,
        spec=spec,
        latent_size=size,
        patch_size=patch_size,
        times=tuple(times),
        cond_type=cond_type,
        guidance=Guidance(
            text=option.guidance,
            image=1.0 if option.guidance_img is None else option.guidance_img,
            text_osci=option.text_osci,
            image_osci=option.image_osci,
            scale_temporal_osci=option.scale_temporal_osci and is_image_condition(cond_type),
        ),
        has_image=given and size[0] > 1,
        drop_duplicates=given and is_image_condition(cond_type) and not (spec.is_causal or option.is_causal_vae),
        method=option.method,
        solver=option.solver,
        step_cache=StepCacheChoice.of(option.step_cache, option.step_cache_threshold),
        distilled=distilled,
        keep_given=option.keep_given and given and size[0] > 1,
    )


def _check_condition(cond_type: str, num_frames: int, latent_frames: int, spec: LatentSpec) -> None:
    if fits(cond_type, latent_frames, spec.is_causal):
        return
    if isinstance(get_condition(cond_type), FreeCondition):
        raise UserError(f"cond_type {cond_type} with num_frames={num_frames}: too short a video to give a part of it")
    given = sum(span.latent_frames(spec.is_causal) for span in get_spans(cond_type))
    shortest = given * spec.compression[0] + 1 if spec.is_causal else (given + 1) * spec.compression[0]
    raise UserError(
        f"cond_type {cond_type} with num_frames={num_frames}: the references would fill the whole video; "
        f"it needs at least {shortest} frames"
    )


def starts_from_picture(cond_type: str) -> str:
    """Condition of a video whose picture is made first (``use_t2i2v``): ``t2v`` asks for none, so it starts from it."""
    return cond_type if takes_references(cond_type) else "i2v_head"


def image_plan(option: SamplingOption, resolution: str, spec: LatentSpec, patch_size: int) -> SamplePlan:
    """Run of the image model that comes before a video (``use_t2i2v``).

    The picture has the aspect ratio of the video; steps, shift and solver are the video's.

    Args:
        option: of the video.
        resolution: pixel count of the picture by name (``img_resolution``).
        spec: of the image autoencoder.
        patch_size: of the image model.
    """
    ratio = option.aspect_ratio
    if ratio is None:
        ratio = closest_aspect_ratio(*frame_size(option, 1), aspect_ratio_table(2**20))
    height, width = get_image_size(resolution, ratio, training=True)
    picture = replace(option, num_frames=1, height=height, width=width, guidance=IMAGE_GUIDANCE, method="distill")
    return make_plan(picture, spec, patch_size)
