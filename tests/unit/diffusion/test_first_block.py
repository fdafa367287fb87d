"""The first-block cache: exact where nothing may be left out, by row and by branch where something is."""

from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from opensora.diffusion.first_block import FirstBlockCache
from opensora.diffusion.guidance import Guidance
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.plan import make_plan
from opensora.diffusion.solvers import euler, heun, make_steps, solve
from opensora.diffusion.step_cache import STEP_CACHES, StepCacheChoice
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, guided_velocity
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError
from tests.parallel.tiny import tiny_inputs, tiny_model
from tests.unit.diffusion.test_plan import option


def rows_of(inputs, rows):
    return {name: x[rows] for name, x in inputs.items()}


def sampled(cache, steps=5, guidance=None, solver=euler, rows=slice(None), model=None):
    """A run of a tiny model with a picture, so with up to three branches."""
    inputs = rows_of(tiny_inputs(image=12, batch=2), rows)
    model = model or tiny_model(depth=2).eval()
    denoiser = Denoiser(model, inputs["img_ids"], inputs["txt_ids"], inputs["cond"], cache)
    texts = TextEmbeddings(inputs["txt"], inputs["y_vec"]), TextEmbeddings(-inputs["txt"], -inputs["y_vec"])
    velocity = guided_velocity(denoiser, *texts, guidance or Guidance(5.0, 2.0), steps, 3, has_image=True)
    times = torch.linspace(1, 0, steps + 1).tolist()
    return solve(solver, velocity, inputs["img"], make_steps(times))


def rows_through(model):
    """Counts the rows that come to each block."""
    counts = Counter()
    blocks = [*model.double_blocks, *model.single_blocks]
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda block, args, number=number: counts.update({number: len(args[0])}))
    return counts


@pytest.mark.parametrize("layout", [{}, {"depth": 0}], ids=["both kinds of block", "single blocks alone"])
def test_where_nothing_is_left_out_it_is_the_plain_run(layout):
    model = tiny_model(**layout).eval()
    cache = FirstBlockCache(5, threshold=1e-9)
    assert torch.equal(sampled(cache, model=model), sampled(None, model=model))
    assert (cache.evaluated, cache.reused) == ([15, 15], [0, 0])


def test_first_and_last_step_always_run():
    model = tiny_model(depth=2).eval()
    counts, cache = rows_through(model), FirstBlockCache(5, threshold=1e9)
    sampled(cache, model=model)
    assert (cache.evaluated, cache.reused) == ([15, 15], [9, 9])
    assert dict(counts) == {0: 30, 1: 12, 2: 12, 3: 12}  # 5 steps, 3 branches, 2 samples


def test_what_is_added_again_is_what_the_other_blocks_added_last():
    model, inputs = tiny_model(depth=2).eval(), tiny_inputs(image=12, batch=2)
    cache, around = FirstBlockCache(9, threshold=1e9), []

    def through(run, *tokens):
        first = run.first(*tokens)
        around.append((first[0], run.rest(*first, *tokens[2:])))
        return cache.around_blocks(run, *tokens, ("prompt",), len(around))

    with torch.no_grad():
        model(**inputs, around=through)
        again = model(**{**inputs, "img": inputs["img"] + 1}, around=lambda *given: through(*given))
        expected = model(
            **{**inputs, "img": inputs["img"] + 1},
            around=lambda run, *tokens: run.first(*tokens)[0] + around[0][1] - around[0][0],
        )
    assert_close(again, expected)
    assert cache.reused == [1, 1]


def test_every_row_is_decided_by_itself():
    """A batch whose rows change differently makes of each what it makes of it alone."""
    threshold = 0.7
    both = FirstBlockCache(8, threshold)
    batch = sampled(both, steps=8)
    alone = [FirstBlockCache(8, threshold) for _ in range(2)]
    singles = [sampled(cache, steps=8, rows=slice(i, i + 1)) for i, cache in enumerate(alone)]
    assert_close(batch, torch.cat(singles), rtol=1e-4, atol=1e-4)
    assert both.reused == [cache.reused[0] for cache in alone]
    assert both.reused[0] != both.reused[1], "the rows must differ for this test to tell anything"
    assert min(both.reused) > 0


def test_branches_one_by_one_are_the_same(monkeypatch):
    together = FirstBlockCache(8, 0.7)
    expected = sampled(together, steps=8)
    monkeypatch.setattr("opensora.diffusion.velocity.MAX_TOKENS_AT_ONCE", 1)
    apart = FirstBlockCache(8, 0.7)
    assert_close(sampled(apart, steps=8), expected, rtol=1e-4, atol=1e-4)
    assert (apart.evaluated, apart.reused) == (together.evaluated, together.reused)


def test_oscillating_guidance_leaves_branches_out():
    """After ten steps odd ones run the prompt's branch alone; the others are compared with their own last one."""
    guidance = Guidance(5.0, 2.0, text_osci=True, image_osci=True)
    cache = FirstBlockCache(14, 1e9)
    assert sampled(cache, steps=14, guidance=guidance).isfinite().all()
    # steps 0 to 9, 10 and 12 have three branches, 11 and 13 one; the first three and the last one are whole
    assert (cache.evaluated, cache.reused) == ([38, 38], [34, 34])
    exact = FirstBlockCache(14, 1e-9)
    assert torch.equal(sampled(exact, steps=14, guidance=guidance), sampled(None, steps=14, guidance=guidance))


def test_solvers_with_two_evaluations_per_step():
    cache = FirstBlockCache(5, 1e9)
    sampled(cache, solver=heun)
    # nine evaluations; the first step's first, and those guided as in the last step, are whole
    assert cache.evaluated == [27, 27]
    assert cache.reused == [27 - 3 * 3, 27 - 3 * 3]


def test_keys_choose_kind_and_threshold(monkeypatch):
    spec = LatentSpec((4, 8, 8), is_causal=True)

    def chosen(**keys):
        return make_plan(option(**keys), spec, 2).step_cache

    assert chosen() is None
    assert chosen(step_cache_threshold=0.0) is chosen(step_cache="first_block", step_cache_threshold=0.0) is None
    assert chosen(step_cache_threshold=0.2) == StepCacheChoice("first_block", 0.2)
    assert chosen(step_cache="first_block") == StepCacheChoice("first_block", 0.1)
    monkeypatch.setattr(STEP_CACHES, "_added", {"mine": lambda num_steps: None})
    assert chosen(step_cache="mine") == StepCacheChoice("mine")
    with pytest.raises(UserError, match=r"step_cache_threshold=0.2: mine takes no threshold"):
        chosen(step_cache="mine", step_cache_threshold=0.2)


def test_a_model_in_one_piece_is_refused():
    with pytest.raises(UserError, match="first block can be run by itself"):
        FirstBlockCache(5).around_blocks(lambda *tokens: tokens[0], *[torch.zeros(1)] * 4, ("prompt",), 0)


def test_a_run_tells_what_it_left_out(tiny_config):
    pipe = VideoPipeline.from_config(tiny_config, num_steps=5)
    exact, cached = pipe("a cat", seed=1), pipe("a cat", seed=1, step_cache_threshold=5.0)
    assert exact.reused == []
    assert cached.reused == [pytest.approx(3 / 5)]
    assert not torch.equal(cached.latents, exact.latents)
    assert pipe("a cat", seed=1, step_cache_threshold=0.0).latents.equal(exact.latents)
