"""One micro-batch of autoencoder training: from clips to the loss, with mixed lengths and the discriminator's turn."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.datasets.dataloader import to_device
from opensora.models.autoencoder import LatentSpec
from opensora.models.vae.losses import VAELoss
from opensora.training.checkpoint.folder import RunningStates
from opensora.training.roles import MODEL, Turn
from opensora.training.vae.adversarial import DISCRIMINATOR, Adversary

VIDEO_IMAGE, VIDEO_RANDOM = "mixed_video_image", "mixed_video_random"
CAUSAL = LatentSpec((4, 8, 8), is_causal=True)


@dataclass(frozen=True)
class LengthMixer:
    """Shortens clips in training, so that an autoencoder learns pictures and all lengths beside full clips.

    Args:
        strategy: "mixed_video_image": whole micro-batches are cut to their first frames; "mixed_video_random": they are
            cut to a length drawn from all that the autoencoder takes; None: left as they are.
        image_ratio: share of micro-batches that "mixed_video_image" cuts. With several ranks, the first always keeps
            its clips and the others make up for it.
        spec: sizes of the autoencoder's latents.
        replicas, rank: data-parallel size and place.
    """

    strategy: str | None = None
    image_ratio: float = 0.0
    spec: LatentSpec = CAUSAL
    replicas: int = 1
    rank: int = 0

    def on_rank(self, rank: int, replicas: int) -> "LengthMixer":
        """The mixer of one of several ranks."""
        return replace(self, rank=rank, replicas=replicas)

    @property
    def probability(self) -> float:
        """How often "mixed_video_image" cuts a micro-batch of this rank."""
        if self.replicas == 1:
            return self.image_ratio
        return 0.0 if self.rank == 0 else min(self.image_ratio * self.replicas / (self.replicas - 1), 1.0)

    def lengths(self, frames: int) -> list[int]:
        """Lengths up to ``frames`` that come back from the autoencoder as they were."""
        return [length for length in range(1, frames + 1) if self.spec.keeps_length(length)]

    def __call__(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """``[B, 3, T, H, W]``, cut to its first frames where the generator says so."""
        frames = video.shape[2]
        if self.strategy is None or frames == 1:
            return video
        chance = float(torch.rand((), generator=generator, dtype=torch.float64))
        if self.strategy == VIDEO_IMAGE:
            return video[:, :, :1] if chance < self.probability else video
        lengths = self.lengths(frames)
        return video[:, :, : lengths[int(chance * len(lengths))]]


class VAEStep:
    """What a micro-batch of clips is minimised for, with the numbers to log.

    The discriminator's forward and backward come after the autoencoder's backward, when its graph is gone.

    Args:
        model: the autoencoder as it is called, wrapped or not.
        plain: the same without wrapper.
        loss: reconstruction, perceptual and KL terms.
        mixer: shortens clips.
        device, dtype: where and in what the model works.
        states: where the run stands; the adversarial losses begin by it.
        adversary: the discriminator, None without one.
        latent_noise: largest standard deviation of noise between encoder and decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: Any,
        loss: VAELoss,
        mixer: LengthMixer,
        device: torch.device,
        dtype: torch.dtype,
        states: RunningStates,
        adversary: Adversary | None = None,
        latent_noise: float = 0.0,
    ) -> None:
        self.disturb = {"latent_noise": latent_noise} if latent_noise else {}
        self.model, self.plain, self.loss, self.mixer = model, plain, loss, mixer
        self.device, self.dtype, self.states, self.adversary = device, dtype, states, adversary
        self.trainable = any(p.requires_grad for p in plain.parameters())

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> Iterator[Turn]:
        """Turns of the autoencoder and, once it has begun, of the discriminator; all randomness is ``generator``'s."""
        video = self.mixer(to_device(batch, self.device, self.dtype)["video"], generator)
        torch.manual_seed(generator.initial_seed())  # dropout draws from torch's own generator
        turn, fake = self._autoencoder(video, generator)
        yield turn
        del turn
        if self.adversary is None:
            return
        loss, numbers = self.adversary.discriminator_loss(video, fake, self.states.global_step, generator)
        if loss is not None:
            yield Turn(DISCRIMINATOR, loss, numbers)

    def _autoencoder(self, video: Tensor, generator: torch.Generator) -> tuple[Turn, Tensor]:
        """The autoencoder's turn, and its reconstruction without graph."""
        with torch.set_grad_enabled(self.trainable):
            reconstruction, posterior, _ = self.model(video, generator=generator, **self.disturb)
            terms = self.loss.terms(video, reconstruction, posterior)
        total, numbers = terms.total, dict(terms.parts)
        if self.adversary is not None and self.trainable:
            adversarial, more = self.adversary.generator_loss(
                terms.nll, reconstruction, self.plain.get_last_layer(), self.states.global_step
            )
            total = total if adversarial is None else total + adversarial
            numbers |= more
        if self.mixer.strategy is not None and video.shape[2] == 1:  # the curves of clips stay comparable
            numbers = {f"image_{name}": value for name, value in numbers.items()}
        return Turn(MODEL, total, numbers), reconstruction.detach()
