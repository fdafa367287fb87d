"""Videos longer than a model makes at once, in windows: the latents of each, and what it continues from."""

import random
from dataclasses import dataclass

from opensora.config.options import SamplingOption
from opensora.diffusion.conditions import get_spans
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError

CLIP = "v2v_head"  # condition by which a window continues, if it is long enough


@dataclass(frozen=True)
class Windows:
    """How a video is divided. All windows are of one length, and what the last of them makes beyond the end is dropped,
    so that a longer video begins as a shorter one does.

    Attributes:
        num_frames: pixel frames of the whole video.
        latent_frames: latent frames of the whole video.
        window: latent frames of a window.
        overlap: latent frames that a window has in common with the one before.
    """

    num_frames: int
    latent_frames: int
    window: int
    overlap: int

    @classmethod
    def of(cls, option: SamplingOption, spec: LatentSpec) -> "Windows | None":
        """Windows of a video with these sampling options; None where it is made at once.

        Raises:
            UserError: lengths that the autoencoder does not make, or an overlap that leaves a window nothing to make.
        """
        if option.window is None or not is_long(option):
            return None
        spec.check_frames(option.num_frames)
        check_length(option.window, "sampling_option.window", spec)
        window = spec.latent_size(option.window, 1, 1)[0]
        overlap = _overlap(option, spec, window)
        return cls(option.num_frames, spec.latent_size(option.num_frames, 1, 1)[0], window, overlap)

    @property
    def count(self) -> int:
        """Number of windows."""
        return 1 - (self.window - self.latent_frames) // self.advance

    @property
    def advance(self) -> int:
        """Latent frames that a window adds."""
        return self.window - self.overlap

    def end(self, made: int) -> int:
        """Latent frames of the video once ``made`` windows are there."""
        return min(made and self.overlap + made * self.advance, self.latent_frames)

    def new(self, index: int) -> slice:
        """Latent frames of window ``index`` (from 0) that go into the video."""
        begin = self.overlap if index else 0
        return slice(begin, begin + self.end(index + 1) - self.end(index))


def is_long(option: SamplingOption) -> bool:
    """Whether a video with these sampling options is made in windows."""
    return option.window is not None and option.num_frames > option.window


def _overlap(option: SamplingOption, spec: LatentSpec, window: int) -> int:
    """Latent frames in common."""
    clip = get_spans(CLIP)[0].latent_frames(spec.is_causal)
    if option.overlap is None:
        return clip if 2 * clip <= window + 1 else 1
    check_length(option.overlap, "sampling_option.overlap", spec)
    overlap = spec.latent_size(option.overlap, 1, 1)[0]
    if overlap >= window:
        raise UserError(
            f"sampling_option.overlap={option.overlap}: a window of {option.window} frames has nothing left to make; "
            f"less than {option.window} frames leave something"
        )
    return overlap


def check_length(frames: int, name: str, spec: LatentSpec) -> None:
    """Refuse a number of frames that an autoencoder does not make, and a window that has room for nothing new.

    Args:
        frames: so many.
        name: of the key that says it.
        spec: of the autoencoder.

    Raises:
        UserError: says which numbers would be right.
    """
    near = spec.nearest_frames(frames)
    if near != (frames,) or (name.endswith("window") and spec.latent_size(frames, 1, 1)[0] < 2):
        right = " or ".join(str(each) for each in near if each > 1 or not name.endswith("window")) or "more"
        raise UserError(f"{name}={frames}: this autoencoder takes {spec.rule} frames; use {right}")


def window_seed(seed: int, index: int) -> int:
    """Seed of the noise of a window: that of the video for the first, and others that follow from it (``seed + 1``
    would be that of the prompt's next repetition)."""
    return seed if not index else random.Random(f"{seed}/window/{index}").getrandbits(63)
