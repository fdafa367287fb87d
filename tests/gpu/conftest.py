"""Checks of what only a GPU runs: each kernel, tiling and way of saving memory against the plain path.

    pytest tests/gpu

They are skipped without CUDA, and take under three minutes with it. Those with `anywhere` run on a CPU too, at the same
toy size.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora.registry import MODELS, build_module

HERE = Path(__file__).parent
REASON = "needs a GPU: torch finds no CUDA device here"


def pytest_configure(config):
    config.addinivalue_line("markers", "anywhere: of tests/gpu, runs on a CPU too")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in Path(item.path).parents and item.get_closest_marker("anywhere") is None:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device():
    """The GPU, or where a test runs anywhere, the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def saved_config(tiny_config, tmp_path):
    """The tiny config with a file of weights: random ones are drawn where a model is built, which is on the CPU for one
    that comes to the GPU only to work."""
    path = tmp_path / "model.safetensors"
    model = build_module(tiny_config["model"], MODELS, device_map="cpu", torch_dtype=torch.float32)
    save_file(model.state_dict(), path)
    return {**tiny_config, "model": {**tiny_config["model"], "from_pretrained": str(path)}}


@pytest.fixture
def precise():
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = True
