"""Loss of a diffusion batch, and what is worth seeing of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora.datasets.dataloader import to_device
from opensora.diffusion.flow import flow_matching_loss
from opensora.training.diffusion.inputs import InputEncoder
from opensora.training.report.metrics import Mean, Rate, StageTimer, Value
from opensora.training.report.throughput import TERA, TrainingFlops

TIME_QUARTERS = ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1")


class DiffusionLoss:
    """Rectified-flow loss (arXiv:2209.03003) of a batch of clips and captions.

    Args:
        model: called with the inputs; an engine's wrapper or the plain model.
        encode: makes the inputs.
        device: where batches go.
        dtype: of the pixels there.
        flops: arithmetic of a sample, for the rate.
        timer: takes the time of encoding and of the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: InputEncoder,
        device: torch.device,
        dtype: torch.dtype,
        flops: TrainingFlops | None = None,
        timer: StageTimer | None = None,
    ) -> None:
        self.model, self.encode, self.device, self.dtype = model, encode, device, dtype
        self.flops, self.timer = flops, timer or StageTimer(device, enabled=False)

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Mapping[str, Value]]:
        """See :class:`opensora.training.loop.LossFunction`."""
        with self.timer("encode"):
            prepared = self.encode(to_device(batch, self.device, self.dtype), generator)
        with self.timer("forward"):
            pred = self.model(**prepared["inputs"])
            loss = flow_matching_loss(pred, prepared["target"], prepared["mask"])
        metrics: dict[str, Value] = {
            f"loss_bucket/{bucket_name(batch)}": loss.detach(),
            **self._losses(pred, prepared),
            **self._work(prepared["inputs"]),
        }
        return loss, {**metrics, **self.timer.take()}

    @torch.no_grad()
    def _losses(self, pred: Tensor, prepared: Mapping[str, Any]) -> dict[str, Value]:
        """Loss by quarter of the diffusion time."""
        per_sample = (pred.float() - prepared["target"].float()).square().mean((1, 2))
        quarter = (prepared["inputs"]["timesteps"].float() * 4).long().clamp(0, 3)
        member = torch.nn.functional.one_hot(quarter, 4).to(per_sample)
        totals, counts = per_sample @ member, member.sum(0)
        return {f"loss_time/{name}": Mean(totals[i], counts[i]) for i, name in enumerate(TIME_QUARTERS)}

    def _work(self, inputs: Mapping[str, Any]) -> dict[str, Value]:
        samples, tokens = inputs["img"].shape[:2]
        text = inputs["txt"].shape[1]
        rates = {"samples": Rate(samples), "tokens": Rate(samples * (tokens + text))}
        if self.flops is not None:
            rates["tflops"] = Rate(samples * self.flops.per_sample(tokens, text) / TERA, per_device=True)
        return dict(rates)


def bucket_name(batch: Mapping[str, Any]) -> str:
    """Frames x height x width of the batch, in pixels."""
    return "x".join(map(str, batch["size"][0]))
