"""What an autoencoder is to everything that uses one, and what its latents are like.

Encoding has two steps. What is *stored* (a cache keeps it, see `opensora.encoded`) depends on the pixels and the
weights alone: the moments of a posterior, or latents. What is *final*, the latents that a diffusion model works on, is
made of it each time: drawn from the posterior, and scaled.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from opensora.models.vae.footprint import Cost, cost_of
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.tiling import Tiling
from opensora.utils.errors import UserError


class LatentMoments(Protocol):
    """Mean and spread of raw latents over a dataset (`opensora.evaluation.latents.RunningMoments`)."""

    @property
    def mean(self) -> Tensor:
        """Mean per channel, ``[C]``."""

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel, ``[C]``."""

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation over all channels together."""


@runtime_checkable
class Autoencoder(Protocol):
    """Clips ``[B, 3, T, H, W]`` in [-1, 1] to latents ``[B, C, t, h, w]`` of about unit variance, and back.

    A class that is one derives from ``(nn.Module, Autoencoder)``, in this order. It must have what is abstract here;
    the rest describes an autoencoder without a posterior, scaling, tiles or gradient checkpointing.

    Attributes:
        tiling: the tiles it works in, None for one that cannot.
        scaling_keys: keys of its config section that only scale the step from stored to final latents.
        supports_grad_checkpoint: whether `set_grad_checkpoint` does anything.
    """

    tiling: Tiling | None = None
    scaling_keys: Sequence[str] = ()
    supports_grad_checkpoint: bool = False

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Number of latent channels C."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether the first frame has a latent of its own, so that frame counts are rk + 1 instead of rk."""

    @abstractmethod
    def encode_stored(self, x: Tensor) -> Tensor:
        """What there is to store of clips, nothing in it random: posterior moments ``[B, 2C, t, h, w]``, or latents.

        Raises:
            UserError: sizes that do not fit; says which do.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents ``[B, C, t, h, w]`` to clips, about [-1, 1]."""

    @abstractmethod
    def get_last_layer(self) -> Tensor:
        """Weight of the last convolution (where the adaptive GAN weight compares gradients)."""

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        sample_posterior: bool = True,
        generator: torch.Generator | None = None,
        latent_noise: float = 0.0,
    ) -> tuple[Tensor, DiagonalGaussian | None, Tensor]:
        """Reconstruct (a module's ``forward``): ``(reconstruction like x, posterior if there is one, latents)``.

        ``latent_noise`` is that of :func:`opensora.models.vae.disturbance.disturbed`, between encoder and decoder;
        it is only given where training asks for it.
        """

    def decode_parts(self, z: Tensor) -> Iterator[Tensor]:
        """What `decode` gives of one sample, bit for bit, in consecutive parts along time ``[1, 3, T', H, W]``; each is
        finished, and nothing of it is held once the next is asked for. Here one part, all of it."""
        yield self.decode(z)

    def decode_cost(self, size: Sequence[int], dtype: torch.dtype) -> Cost | None:
        """What decoding a latent (t, h, w) in parts takes with the present `tiling`, on a GPU and beyond the weights;
        None where that cannot be told. Counted (`opensora.models.vae.footprint`), in ``dtype``."""
        tile = [*size] if self.tiling is None else self.tiling.largest(size)
        latent = torch.empty(1, self.latent_channels, *tile, dtype=dtype, device="meta")
        cost = self._cost(dtype, lambda: self.decode(latent))
        if cost is None:
            return None
        whole = tile[0] * math.prod(size[1:]) * math.prod(self.compression) * 3  # pixels of a part
        # joined from strips while the last of them is made; then, the network being done, made uint8 by way of float32
        peak = max(cost.peak + 2 * whole * dtype.itemsize, whole * (dtype.itemsize + 8))
        return self._of_tiles(cost, peak, tile, size)

    def encode_cost(self, size: Sequence[int], dtype: torch.dtype) -> Cost | None:
        """The same for encoding a clip (T, H, W)."""
        latent, tile = self.get_latent_size(size), [*size]
        largest = latent if self.tiling is None else self.tiling.largest(latent)
        if largest != latent:
            tile = [min(part) for part in zip(size, (n * ratio for n, ratio in zip(largest, self.compression)))]
            tile[0] = self.nearest_frames(tile[0])[0]
        clip = torch.empty(1, 3, *tile, dtype=dtype, device="meta")
        cost = self._cost(dtype, lambda: self.encode_stored(clip))
        if cost is None:
            return None
        return self._of_tiles(cost, cost.peak + 3 * math.prod(size) * dtype.itemsize, largest, latent)

    def _of_tiles(self, cost: Cost, peak: float, tile: Sequence[int], size: Sequence[int]) -> Cost:
        """Cost of all tiles, from that of the largest."""
        work = 1.0 if self.tiling is None else self.tiling.work(size)
        share = work * math.prod(size) / math.prod(tile)
        return Cost(peak, cost.written * share, cost.flops * share)

    def _cost(self, dtype: torch.dtype, run: Callable[[], object]) -> Cost | None:
        """Cost of a run in one piece."""
        before = self.tiling
        try:
            if before is not None:
                self.tiling = replace(before, use_spatial=False, use_temporal=False, runner=None)
            return cost_of(cast(nn.Module, self), dtype, run)
        finally:
            self.tiling = before

    def from_stored(
        self, stored: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True
    ) -> Tensor:
        """Latents ``[B, C, t, h, w]`` of what `encode_stored` gave. Needs no weights: the model may be on meta.

        Args:
            stored: on any device, in any dtype; latents come back in the same.
            generator: source of the posterior noise.
            sample_posterior: draw from the posterior, otherwise take its mean.
        """
        return self.normalize(stored)

    def encode(self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Clips to latents, both steps at once.

        Args:
            x: ``[B, 3, T, H, W]`` in [-1, 1]; T as `nearest_frames` has it, H and W multiples of the compression.
            sample_posterior: draw from the posterior, otherwise take its mean.
            generator: source of the posterior noise.

        Raises:
            UserError: sizes that do not fit; says which do.
        """
        return self.from_stored(self.encode_stored(x), generator, sample_posterior)

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents to the scale the diffusion model works in."""
        return raw

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of :meth:`normalize`."""
        return z

    def scale_text(self, moments: LatentMoments) -> str:
        """Config keys by which `normalize` brings raw latents of these moments to unit variance; "" if it has none."""
        return ""

    def get_latent_size(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Latent (t, h, w) of a clip of (T, H, W).

        Raises:
            UserError: not three whole numbers of 1 or more.
        """
        if len(size) != 3 or not all(side == int(side) and side >= 1 for side in size):
            raise UserError(f"a clip of size {tuple(size)}: give frames, height and width, whole numbers of 1 or more")
        return LatentSpec.of(self).latent_size(*size)

    def nearest_frames(self, num_frames: int) -> tuple[int, ...]:
        """See :meth:`LatentSpec.nearest_frames`."""
        return LatentSpec.of(self).nearest_frames(num_frames)

    def keeps_length(self, num_frames: int) -> bool:
        """See :meth:`LatentSpec.keeps_length`."""
        return LatentSpec.of(self).keeps_length(num_frames)

    @contextmanager
    def in_tiles(self, tiling: Tiling | None) -> Iterator[None]:
        """Work in other tiles for a while; None changes nothing."""
        before = self.tiling
        try:
            self.tiling = tiling or before
            yield
        finally:
            self.tiling = before

    @contextmanager
    def tiled(self) -> Iterator[None]:
        """Work in tiles for a while, whatever the config says; no difference for one that cannot.

        Raises:
            UserError: the configured tile sizes cannot be.
        """
        before = self.tiling
        with self.in_tiles(before and replace(before, use_spatial=True, use_temporal=True)):
            yield

    def set_grad_checkpoint(self, enabled: bool = True, last_layer: bool = True) -> None:
        """Recompute the activations of every block in the backward pass instead of keeping them.

        Args:
            enabled: otherwise keep them again.
            last_layer: also those of the last layer, where there are any to speak of. Not for an adaptive GAN weight:
                it takes gradients of that layer twice more, and each would recompute it.
        """
        return

    def forget_decoder(self) -> None:
        """Free the room of what only `decode` needs, which is over then; here the submodule ``decoder``, if any."""
        vars(self).get("_modules", {}).pop("decoder", None)

    def inflate_from_images(self) -> bool:
        """Go over from single frames to clips, in place: each frame is then coded as the picture it was trained as.

        Returns:
            Whether weights were changed; False if there is nothing to change.
        """
        return False


def as_autoencoder(model: object) -> Autoencoder:
    """``model``, known to be an autoencoder.

    Raises:
        UserError: it is none.
    """
    if isinstance(model, Autoencoder):
        return model
    raise UserError(f"{type(model).__name__} is no autoencoder (opensora.models.autoencoder.Autoencoder says what is)")


@dataclass(frozen=True)
class LatentSpec:
    """Sizes of latents, and the lengths of clips that go with them.

    Attributes:
        compression: pixels per latent along (time, height, width).
        is_causal: the first frame has a latent of its own, so that frame counts are rk + 1.
    """

    compression: tuple[int, int, int]
    is_causal: bool

    @classmethod
    def of(cls, ae: object) -> "LatentSpec":
        """Spec of an autoencoder (weights are not needed).

        Raises:
            UserError: it is no autoencoder.
        """
        known = as_autoencoder(ae)
        time, height, width = known.compression
        return cls((time, height, width), known.is_causal)

    @property
    def rule(self) -> str:
        """The lengths above one frame, in words."""
        ratio = self.compression[0]
        return f"{ratio}k+1" if self.is_causal else f"a multiple of {ratio}"

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latent of a video."""
        t, h, w = self.compression
        return (num_frames - 1) // t + 1, -(-height // h), -(-width // w)

    def nearest_frames(self, num_frames: int) -> tuple[int, ...]:
        """The length itself if it can be encoded (one frame, rk + 1 frames if causal, else rk), otherwise the nearest
        ones that can: the shorter, if there is one, and the longer."""
        ratio, lead = self.compression[0], int(self.is_causal)
        below = (num_frames - lead) // ratio * ratio + lead
        if num_frames == 1 or num_frames == below > 0:
            return (num_frames,)
        return tuple(sorted({max(below, 1), max(below, lead) + ratio}))

    def frames_of(self, seconds: float, fps: float) -> int:
        """The length nearest to so many seconds that can be encoded."""
        wanted = round(seconds * fps)
        return min(self.nearest_frames(max(wanted, 1)), key=lambda frames: abs(frames - wanted))

    def keeps_length(self, num_frames: int) -> bool:
        """Whether that many frames can be encoded and come back: a single latent frame decodes to one frame."""
        fits = self.nearest_frames(num_frames) == (num_frames,)
        return fits and (num_frames == 1 or self.latent_size(num_frames, 1, 1)[0] > 1)

    def check_frames(self, num_frames: int) -> None:
        """Raises a UserError with the nearest possible lengths if the autoencoder cannot make this one."""
        near = sorted(self.nearest_frames(num_frames), key=lambda n: (abs(n - num_frames), -n))
        if near[0] != num_frames:
            raise UserError(
                f"num_frames={num_frames}: this autoencoder makes 1 frame or {self.rule}; "
                f"the nearest is {near[0]}" + "".join(f" (or {other})" for other in near[1:])
            )


def check_buckets(bucket_config: Mapping[str, Iterable[int]], ae: Autoencoder) -> None:
    """Refuse bucket lengths that an autoencoder (on the meta device will do) does not take.

    Args:
        bucket_config: the lengths of each resolution: ``{resolution: {num_frames: ...}}``.
        ae: the autoencoder.

    Raises:
        UserError: names the length and the nearest valid ones.
    """
    for resolution, lengths in bucket_config.items():
        for frames in lengths:
            nearest = ae.nearest_frames(frames)
            if nearest != (frames,):
                raise UserError(
                    f"bucket_config[{resolution!r}]: {frames} frames do not fit this autoencoder, which takes "
                    f"{LatentSpec.of(ae).rule}; use {' or '.join(map(str, nearest))}"
                )


def listed(values: Tensor) -> str:
    """Numbers as a config has them: ``[0.1000, -2.0000]``."""
    return "[" + ", ".join(f"{value:.4f}" for value in values.tolist()) + "]"
