"""Flow matching: the model learns the velocity of the straight path between data and noise (arXiv:2209.03003)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from opensora.datasets.dataloader import to_device
from opensora.diffusion.flow import flow_matching_loss, sample_errors
from opensora.training.methods.base import MethodContext, TrainingMethod
from opensora.training.report.metrics import Mean, Rate, Value
from opensora.training.report.throughput import TERA, TrainingFlops
from opensora.training.roles import MODEL, Turn

TIME_QUARTERS = ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1")


class FlowMatching(TrainingMethod):
    """Mean squared error of the predicted velocity, with its metrics. A method that only weighs it otherwise overrides
    :meth:`loss`, one with other targets :meth:`prepare`."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.flops = TrainingFlops(context.plain)

    def __call__(self, batch: Mapping[str, Any], generator: torch.Generator) -> Iterator[Turn]:
        """One turn, of the model."""
        context = self.context
        with context.timer("encode"):
            moved = to_device(dict(batch), context.run.device, context.run.dtype)
            prepared = self.prepare(moved, generator)
        with context.timer("forward"):
            pred = context.model(**prepared["inputs"])
            loss = self.loss(pred, prepared)
        metrics: dict[str, Value] = {
            f"loss_bucket/{bucket_name(batch)}": loss.detach(),
            **self._losses(pred, prepared),
            **self._work(prepared["inputs"]),
        }
        yield Turn(MODEL, loss, {**metrics, **context.timer.take()})

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Model inputs and target of a batch on the device, as :class:`InputEncoder` makes them."""
        return self.context.encode(batch, generator)

    def loss(self, pred: Tensor, prepared: Mapping[str, Any]) -> Tensor:
        """Loss of a prediction ``[B, L, C]``, a scalar; ``prepared`` as :class:`InputEncoder` makes it."""
        return flow_matching_loss(pred, prepared["target"], prepared["mask"], prepared.get("weights"))

    @torch.no_grad()
    def _losses(self, pred: Tensor, prepared: Mapping[str, Any]) -> dict[str, Value]:
        """Loss by quarter of the diffusion time and by condition, and without weights where there are some."""
        per_sample = sample_errors(pred, prepared["target"])
        quarter = (prepared["inputs"]["timesteps"].float() * 4).long().clamp(0, 3)
        member = torch.nn.functional.one_hot(quarter, 4).to(per_sample)
        totals, counts = per_sample @ member, member.sum(0)
        found: dict[str, Value] = {
            f"loss_time/{name}": Mean(totals[i], counts[i]) for i, name in enumerate(TIME_QUARTERS)
        }
        types = prepared.get("conditions") or ()
        for name in sorted(set(types)):
            rows = [row for row, of_row in enumerate(types) if of_row == name]
            found[f"loss_condition/{name}"] = Mean(per_sample[rows].sum(), len(rows))
        if prepared.get("weights") is not None:
            found["loss_unweighted"] = flow_matching_loss(pred, prepared["target"], prepared["mask"])
        return found

    def _work(self, inputs: Mapping[str, Any]) -> dict[str, Value]:
        samples, tokens = inputs["img"].shape[:2]
        text = inputs["txt"].shape[1]
        work = samples * self.flops.per_sample(tokens, text) / TERA
        return {
            "samples": Rate(samples),
            "tokens": Rate(samples * (tokens + text)),
            "tflops": Rate(work, per_device=True),
        }


def bucket_name(batch: Mapping[str, Any]) -> str:
    """Frames x height x width of the batch, in pixels."""
    return "x".join(map(str, batch["size"][0]))
