"""Runs of latent frames that a condition gives."""

from dataclasses import dataclass
from typing import Literal

from opensora.datasets.runs import FrameRun


@dataclass(frozen=True)
class Span:
    """A run of given latent frames.

    Attributes:
        at: the run lies at the start (``head``) or at the end (``tail``) of the video, and is taken from the same end
            of its reference; or the number of its first latent frame, and it is taken from the start.
        reference: which of a sample's references it is taken from: 0 the first, -1 the last.
        groups: None for a single picture, else how many groups of (time compression) pixel frames; a causal
            autoencoder puts one more frame, on its own, before them.
    """

    at: Literal["head", "tail"] | int
    reference: int
    groups: int | None = None

    def latent_frames(self, is_causal: bool) -> int:
        """Given latent frames."""
        return 1 if self.groups is None else self.groups + int(is_causal)

    def pixel_frames(self, is_causal: bool, time_compression: int = 4) -> int:
        """Pixel frames to read and encode for them."""
        return 1 if self.groups is None else self.groups * time_compression + int(is_causal)

    def latent_run(self, is_causal: bool) -> FrameRun:
        """The run among latent frames."""
        return FrameRun(self.at, self.latent_frames(is_causal))

    def pixel_run(self, is_causal: bool, time_compression: int = 4) -> FrameRun:
        """The run among pixel frames.

        Placed by a number, it begins with the last frame of its first latent where the autoencoder is causal (a frame
        of a group is encoded as a first frame, as at the end of the video), and with the first one elsewhere.
        """
        at = self.at if isinstance(self.at, str) else self.at * time_compression
        return FrameRun(at, self.pixel_frames(is_causal, time_compression))
