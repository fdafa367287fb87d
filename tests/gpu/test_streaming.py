"""Weights that come to the GPU when they work: the numbers of the plain path, within the memory that is given."""

import pytest
import torch
from torch import nn

from opensora.acceleration.placing import Mover, bytes_of, placed
from opensora.acceleration.streaming import streamed
from opensora.diffusion.pipeline import VideoPipeline
from tests.parallel.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


class Tower(nn.Module):
    """Eight blocks of 16 MiB, each of which takes long enough for copies to come too early."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(8))

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return Tower().requires_grad_(False)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("blocks", [2, 3, 6, None])
def test_same_numbers_within_the_room(tower, pinned, blocks):
    x = torch.randn(8192, 2048, device=GPU)
    with placed(tower, GPU), torch.no_grad():
        expected = tower(x)
    size = bytes_of(tower) // 8 + 1024
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    room = None if blocks is None else blocks * size
    with streamed(tower, tower.blocks, GPU, room, pinned), torch.no_grad():
        held = torch.cuda.memory_allocated() - before
        found = [tower(x) for _ in range(5)]
    assert room is None or held <= room
    assert all(torch.equal(each, expected) for each in found)
    del found
    assert torch.cuda.memory_allocated() == before
    assert all(weight.device.type == "cpu" for weight in tower.parameters())


def test_copies_through_pinned_buffers():
    big = torch.randn(5000, 7001)
    moved = Mover(GPU, staged=1 << 20)(big)
    assert torch.equal(moved.cpu(), big)


@pytest.mark.parametrize("changes", [{"offload": True}, {"offload": "blocks"}, {"offload": "disk"}, {}])
def test_pipelines_make_the_same(saved_config, changes):
    plain, other = (
        VideoPipeline.from_config({**saved_config, "device": "cuda"}, precompute=precompute, **more)
        for precompute, more in ((False, {}), (True, changes))
    )
    assert torch.equal(plain("a", seed=1).latents, other("a", seed=1).latents)
    assert {
        weight.device.type
        for weight in other.models["model"].modulation_layers()["single_blocks.0.modulation.lin"].parameters()
    } == {"cpu"}


def test_blocks_of_the_transformer_come_and_go():
    model = tiny_model(torch.bfloat16, depth=3, depth_single_blocks=4, hidden_size=512, axes_dim=[64, 32, 32]).eval()
    tokens = {"img": (1, 600, 8), "cond": (1, 600, 12), "txt": (1, 50, 20), "y_vec": (1, 12)}
    inputs = {key: torch.randn(*size, device=GPU, dtype=torch.bfloat16) for key, size in tokens.items()}
    inputs |= {"img_ids": torch.rand(1, 600, 3, device=GPU), "txt_ids": torch.zeros(1, 50, 3, device=GPU)}
    inputs["timesteps"] = torch.full((1,), 0.5, device=GPU, dtype=torch.bfloat16)
    with torch.no_grad():
        with placed(model, GPU):
            expected = model(**inputs)
        with streamed(model, model.blocks_in_order(), GPU, bytes_of(model) // 2) as stream:
            found = [model(**inputs) for _ in range(3)]
    assert stream.streamed
    assert all(torch.equal(each, expected) for each in found)
