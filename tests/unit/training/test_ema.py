"""Averaged weights."""

import torch
from torch import nn

from opensora.training.weights.ema import EMA


def test_ema_is_float32_and_equals_the_formula():
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().double()
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(0.01)
        ema.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert ema.shadow["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.shadow["weight"].double(), expected, atol=1e-6, rtol=1e-6)
