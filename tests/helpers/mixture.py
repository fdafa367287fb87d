"""A flow in the plane whose distribution is known: a mixture of normals, with its velocity in closed form.

The prompt is a component: given one, the distribution is that component alone; without a prompt it is the mixture.
Everything here is float64, written for itself.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config.options import ModelOptions
from opensora.models.diffusion import DiffusionModel
from opensora.training.report.metrics import StageTimer

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
DEVIATION = 0.4
EMPTY_TXT, EMPTY_VEC = torch.zeros(1, 1, 1), torch.zeros(1, 3)


def velocity(x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
    """E[noise - data | x at t] for data of the mixture: x [B, 2], t [B] (1 is noise), weights [B, 3] -> [B, 2]."""
    x, t, weights = x.double(), t.double()[:, None], weights.double()
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    away = x[:, None] - (1 - t)[..., None] * MEANS
    likelihood = weights.log() - away.square().sum(-1) / (2 * variance)
    share = likelihood.softmax(-1)[..., None]
    data = MEANS + ((1 - t) * DEVIATION**2 / variance)[..., None] * away
    noise = (t / variance)[..., None] * away
    return (share * (noise - data)).sum(1)


def text_weights(y_vec: Tensor) -> Tensor:
    """Weights of the components by the pooled text: one-hot, or zero for the mixture."""
    return torch.where(y_vec.double().sum(-1, keepdim=True) > 0, y_vec.double() + 1e-30, WEIGHTS)


def guided_velocity(x: Tensor, t: Tensor, y_vec: Tensor, scale: Any) -> Tensor:
    """Classifier-free guidance of it; scale: a number or [B, 1]."""
    unconditional = velocity(x, t, WEIGHTS.expand(len(x), 3))
    return unconditional + scale * (velocity(x, t, text_weights(y_vec)) - unconditional)


class ExactTeacher(DiffusionModel):
    """The flow as a diffusion model of one token with two channels."""

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, around=None):
        return velocity(img[:, 0], timesteps, text_weights(y_vec))[:, None]


class Student(DiffusionModel):
    """A small network of place, time, prompt and scales."""

    def __init__(self, width: int = 64, scales: int = 0) -> None:
        super().__init__()
        self.scales, self.config = scales, SimpleNamespace(guidance_embed=scales > 0)
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 6 + 3 + scales, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()), nn.Linear(width, 2)
        )

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, around=None):
        waves = torch.cat([f(timesteps[:, None] * k) for k in (1.0, 3.0, 6.0) for f in (torch.sin, torch.cos)], dim=1)
        told = [guidance[:, : self.scales]] if self.scales else []
        return self.layers(torch.cat([img[:, 0], waves, y_vec, *told], dim=1).to(img.dtype))[:, None]


class Encoder:
    """Stands for the frozen encoders: draws data of the prompt and noises it."""

    empty_text = (EMPTY_TXT, EMPTY_VEC)

    def latent_size(self, batch):
        return (1, 1, 1)

    def __call__(self, batch, generator, timesteps=None):
        y_vec = batch["y_vec"]
        count = len(y_vec)
        t = torch.rand(count, generator=generator) if timesteps is None else timesteps
        data = y_vec @ MEANS.to(y_vec) + DEVIATION * torch.randn(count, 2, generator=generator).to(y_vec)
        noise = torch.randn(count, 2, generator=generator).to(y_vec)
        t = t.to(y_vec)
        ids = torch.zeros(count, 1, 3)
        return {
            "inputs": {
                "img": ((1 - t)[:, None] * data + t[:, None] * noise)[:, None],
                **{"img_ids": ids, "txt": torch.zeros(count, 1, 1).to(y_vec), "txt_ids": ids},
                **{"timesteps": t, "y_vec": y_vec, "guidance": torch.ones(count).to(y_vec)},
            },
            "target": (noise - data)[:, None],
            "mask": None,
        }


def batch_of(count: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Prompts, each component as often as its weight says."""
    chosen = torch.multinomial(WEIGHTS, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    y_vec = torch.nn.functional.one_hot(chosen, 3).to(dtype)
    return {"index": [*range(count)], "size": [(1, 1, 1)] * count, "y_vec": y_vec}


def context_of(model: nn.Module, options: Any, **more: Any) -> Any:
    """What a training method works with."""
    run = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=next(model.parameters()).dtype,
        build=lambda section, **trained: Student().to(next(model.parameters())) if trained else ExactTeacher(),
        master_dtype=torch.float32,
        states=SimpleNamespace(global_step=0, micro_step=0),
    )
    cfg = SimpleNamespace(
        patch_size=1,
        seed=0,
        lora_config=None,
        dataset=None,
        model=ModelOptions(type="exact", from_pretrained="exact"),
        **more.pop("cfg", {}),
    )
    values = dict(
        cfg=cfg, options=options, run=run, model=model, plain=model, encode=Encoder(), total_steps=100,
        timer=StageTimer(torch.device("cpu"), enabled=False),
        role=lambda name, module, optim: SimpleNamespace(engine=SimpleNamespace(model=module)), **more,
    )  # fmt: skip
    return SimpleNamespace(**values)
