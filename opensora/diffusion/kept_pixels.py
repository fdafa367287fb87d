"""What is kept of a region, in pixels: kept latents alone do not bring it back.

A decoder makes a pixel of all latents around it, and normalises over the whole picture: beside the border of what is
made, kept latents come back as other pixels than in the reference's own round trip through the autoencoder (about 10 dB
further off within one latent of the border than behind it, and a little in the whole picture). So the round trip's
pixels are put in, as inpainting does with the picture's own: Blended Latent Diffusion (arXiv:2206.02779), section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from opensora.diffusion.decode import FrameSink, Gathered, decode_into
from opensora.diffusion.free import PlacedLatents
from opensora.models.autoencoder import Autoencoder

RAMP = 8  # the part of a latent's side over which kept pixels fade into the made ones, inwards


@dataclass(frozen=True)
class KeptRegion:
    """What is kept of a sample's reference.

    Attributes:
        latents: [C, T, h, w] of the whole reference.
        cells: which of their pixels are kept, bool [1 or T, h, w].
    """

    latents: Tensor
    cells: Tensor

    @classmethod
    def of(cls, given: Sequence[Tensor] | PlacedLatents | None) -> "KeptRegion | None":
        """That of a sample's reference latents; None where no region is given."""
        if not isinstance(given, PlacedLatents) or given.cells is None:
            return None
        (latents,) = given.exact().latents
        return cls(latents.float().cpu(), given.cells.cpu())

    def weights(self, ae: Autoencoder) -> Tensor:
        """Share of the kept pixels, [1 or frames, H, W] in [0, 1]: 0 where nothing is kept, 1 further inside than the
        ramp. The border of the picture has none."""
        ratio, rows, columns = ae.compression
        cells = self.cells.float().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        across, along = (max(side // RAMP, 1) for side in (rows, columns))
        padded = F.pad(cells[:, None], (along, along, across, across), mode="replicate")
        inner = F.avg_pool2d(padded, (2 * across + 1, 2 * along + 1), stride=1)[:, 0]  # half at a straight border
        weights = torch.where(cells > 0, (2 * inner - 1).clamp(0, 1), 0)
        if len(weights) == 1:
            return weights
        frames = weights.repeat_interleave(ratio, 0)
        return frames[ratio - 1 :] if ae.is_causal else frames


class KeptPixels:
    """A :class:`opensora.diffusion.decode.FrameSink` before another one, which puts kept pixels into the frames.

    Args:
        sink: gets the frames.
        kept: by sample, frames uint8 [T, H, W, 3] and the share of them, float32 [1 or T, H, W, 1].
    """

    def __init__(self, sink: FrameSink, kept: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> None:
        self.sink, self.kept = sink, kept
        self._sample = self._begin = 0

    def start(self, sample: int) -> None:
        """See :class:`opensora.diffusion.decode.FrameSink`."""
        self._sample, self._begin = sample, 0
        self.sink.start(sample)

    def write(self, frames: np.ndarray) -> None:
        """See :class:`opensora.diffusion.decode.FrameSink`."""
        if self._sample in self.kept:
            place = slice(self._begin, self._begin + len(frames))
            kept, weights = self.kept[self._sample]
            weights = weights if len(weights) == 1 else weights[place]
            mixed = frames + weights * (kept[place].astype(np.float32) - frames)
            frames = np.rint(mixed).astype(np.uint8)
            self._begin = place.stop
        self.sink.write(frames)


def decode_keeping(
    sink: FrameSink,
    ae: Autoencoder,
    latents: Tensor,
    kept: Sequence[KeptRegion | None],
    frames: slice,
    device: torch.device,
    dtype: torch.dtype,
    room: int | None = None,
    window: int | None = None,
) -> str:
    """Decode latents, and put the round trip's pixels into what is kept of a region, which is decoded once more.

    Args:
        kept: per sample; none for a batch without regions, which is just decoded.
        sink, ae, latents, frames, device, dtype, room, window: as of :func:`opensora.diffusion.decode.decode_into`,
            whose errors are raised and whose words are returned.
    """
    pixels = {}
    for sample, region in enumerate(kept):
        if region is not None:
            gathered = Gathered()
            decode_into(gathered, ae, region.latents[None], frames, device, dtype, room)
            weights = region.weights(ae)[..., None].numpy()
            pixels[sample] = gathered.videos()[0], weights if len(weights) == 1 else weights[frames]
    into = KeptPixels(sink, pixels) if pixels else sink
    return decode_into(into, ae, latents, frames, device, dtype, room, window)
