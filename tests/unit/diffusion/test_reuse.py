"""What is computed once per sample gives the plain forward's numbers, to the last bit."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opensora.acceleration.placing import bytes_of
from opensora.config.choices import STEP_CACHES
from opensora.diffusion import reuse
from opensora.diffusion.guidance import Guidance
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.reuse import Evaluation, Known, reused
from opensora.diffusion.solvers import SOLVERS, asked, make_steps, solve
from opensora.diffusion.velocity import (
    Denoiser,
    TextEmbeddings,
    distilled_velocity,
    evaluations_of,
    guided_rows,
    guided_velocity,
)
from tests.parallel.tiny import tiny_inputs, tiny_model

STEPS = make_steps([1.0, 0.8, 0.55, 0.3, 0.0])
CPU = torch.device("cpu")
OSCILLATING = Guidance(5.0, 2.0, image_osci=True, scale_temporal_osci=True)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """The modulation of these models is smaller than its table."""
    monkeypatch.setattr(reuse, "MOST", 1000)


def sampled(memory, dtype=torch.float32, batch=2, solver="euler", foresee=True, model=None, cache=None):
    """Four steps of a tiny model with all branches, with and without what is kept."""
    inputs = tiny_inputs(image=12, batch=batch, dtype=dtype)
    model = model or tiny_model(dtype).eval()
    texts = TextEmbeddings(inputs["txt"], inputs["y_vec"]), TextEmbeddings(-inputs["txt"], -inputs["y_vec"])
    guided = (*texts, OSCILLATING, len(STEPS), 3, True)
    coming = [(time, 5.0, guided_rows(*guided)(step)) for time, step in asked(SOLVERS.get(solver), STEPS)]
    with reused(model, CPU, evaluations_of(coming, 12 * batch), batch) if memory else nullcontext() as memo:
        denoiser = Denoiser(model, inputs["img_ids"], inputs["txt_ids"], inputs["cond"], cache, memo)
        if memory and foresee:
            denoiser.foresee(coming, 12 * batch)
        return solve(SOLVERS.get(solver), guided_velocity(denoiser, *guided), inputs["img"], STEPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [10**6, 1])
@pytest.mark.parametrize(("batch", "solver"), [(1, "euler"), (3, "euler"), (2, "heun"), (1, "ab2")])
def test_same_to_the_last_bit(dtype, at_once, batch, solver, monkeypatch):
    monkeypatch.setattr("opensora.diffusion.velocity.MAX_TOKENS_AT_ONCE", at_once)
    made = [sampled(memory, dtype, batch, solver) for memory in (True, False)]
    assert torch.equal(*made)


def test_times_that_nobody_foresaw_are_computed_when_asked_for():
    assert torch.equal(sampled(True, foresee=False), sampled(False))


def test_a_distilled_model_takes_its_scale():
    inputs, model = tiny_inputs(image=12), tiny_model(guidance_embed=True, cond_embed=False).eval()
    text = TextEmbeddings(inputs["txt"], inputs["y_vec"])
    with reused(model, CPU, [], 2) as memo:
        ids = inputs["img_ids"], inputs["txt_ids"]
        found = {
            scale: distilled_velocity(Denoiser(model, *ids, memo=memo), text, scale)(inputs["img"], 0.5, 0)
            for scale in (4.0, 7.0)
        }
    for scale, velocity in found.items():
        assert torch.equal(velocity, distilled_velocity(Denoiser(model, *ids), text, scale)(inputs["img"], 0.5, 0))
    assert not torch.equal(*found.values())


class Counted(nn.Module):
    """Counts the calls of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.calls = layer, 0

    def forward(self, x):
        self.calls += 1
        return self.base_layer(x)


def test_every_layer_works_once_for_each_input():
    model = tiny_model().eval()
    modulation, text = Counted(model.single_blocks[0].modulation.lin), Counted(model.txt_in)
    model.single_blocks[0].modulation.lin, model.txt_in = modulation, text
    sampled(True, model=model, solver="heun")
    assert (modulation.calls, text.calls) == (4, 1), "four times, three branches in one batch"
    assert model.single_blocks[0].modulation.lin is modulation
    sampled(False, model=model, solver="heun")
    assert (modulation.calls, text.calls) == (4 + 7, 1 + 7)


def test_modulation_is_no_part_of_the_model_meanwhile():
    model = tiny_model().eval()
    whole, keys = bytes_of(model), list(model.state_dict())
    layers = sum(map(bytes_of, model.modulation_layers().values()))
    assert layers == 4 * 33 * 32 * (12 + 2 * 3 + 2)
    with pytest.raises(KeyboardInterrupt), reused(model, CPU, [], 1) as memo:  # noqa: PT012
        assert bytes_of(model) == whole - layers
        assert isinstance(model.final_layer.adaLN_modulation[1], Known)
        raise KeyboardInterrupt
    assert (bytes_of(model), list(model.state_dict())) == (whole, keys)
    assert (memo.rows, memo.present) == ({}, None), "nothing is left of the table"


def test_a_table_larger_than_what_it_saves_is_not_made(caplog, monkeypatch):
    monkeypatch.setattr(reuse, "MOST", 0.5)
    monkeypatch.setattr(logging.getLogger("opensora"), "propagate", True)  # also where a program has set it up
    with caplog.at_level("DEBUG", logger="opensora"):
        assert torch.equal(sampled(True, batch=4), sampled(False, batch=4))
    assert "its table of 48 rows would be too large" in caplog.text


class SomeRows:
    """A step cache that runs the blocks for rows 4 and 0, and leaves the others as they came."""

    def around_blocks(self, run, img, txt, vec, rope, branch, step):
        out, rows = img.clone(), [4, 0] if len(img) > 4 else [0]
        out[rows] = run(img[rows], txt[rows], vec[rows], type(rope)(*(x[rows] for x in rope)))
        return out


def test_some_rows_get_their_own_modulation():
    """As one batch of all rows makes it: the plain forward makes it in a batch of two, which rounds differently."""
    some = sampled(True, cache=SomeRows())
    assert_close(some, sampled(False, cache=SomeRows()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(some, sampled(False), atol=0.1)


def test_rows_that_are_of_no_evaluation_are_computed():
    model = tiny_model().eval()
    x, layer = torch.randn(1, 32), model.final_layer.adaLN_modulation[1]
    with reused(model, CPU, [], 1) as memo:
        memo.select(Evaluation(0.5, 1.0, (1, 2)), lambda: torch.ones(2, 32))
        assert torch.equal(model.final_layer.adaLN_modulation[1](x), layer(x))


@pytest.mark.parametrize("merge", [True, False])
def test_the_pipeline_does_it_unasked(tiny_config, tmp_path, merge, monkeypatch):
    """With adapters merged or beside, a step cache, and a batch."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(STEP_CACHES, "_added", {"all": lambda num_steps: AllRows()})
    settings = peft.LoraConfig(r=2, target_modules=["lin", "txt_in"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(VideoPipeline.from_config(tiny_config).models["model"], settings).save_pretrained(tmp_path)
    changes = {"pretrained_lora_path": str(tmp_path), "merge_lora": merge}
    made = [
        VideoPipeline.from_config(tiny_config, precompute=value, **changes)(["a", "b"], seed=1, **more).latents
        for value in (True, False)
        for more in ({}, {"step_cache": "all"})
    ]
    assert all(torch.equal(each, made[0]) for each in made)


class AllRows:
    def around_blocks(self, run, img, txt, vec, rope, branch, step):
        return run(img, txt, vec, rope)
