"""Step caches: put around the transformer's blocks, by branch, and gone where none is chosen."""

import pytest
import torch
from torch.testing import assert_close

from opensora.diffusion.guidance import Guidance
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.solvers import euler, make_steps, solve
from opensora.diffusion.step_cache import STEP_CACHES
from opensora.diffusion.velocity import Denoiser, TextEmbeddings, guided_velocity
from tests.parallel.tiny import tiny_inputs, tiny_model

TIMES = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


class LastResidual:
    """Runs the blocks at every n-th step, and in between adds what they added last, to each branch its own."""

    def __init__(self, every):
        self.every, self.kept, self.calls, self.runs = every, {}, [], 0

    def around_blocks(self, run, img, txt, vec, rope, branch, step):
        self.calls.append((branch, step))
        if step % self.every == 0:
            out = run(img, txt, vec, rope)
            self.runs += 1
            self.kept |= zip(branch, (out - img).chunk(len(branch)))
            return out
        return img + torch.cat([self.kept[name] for name in branch])


def sampled(cache=None, guidance=None):
    """Five steps of a tiny model, three branches each."""
    inputs = tiny_inputs(image=12, batch=2)
    denoiser = Denoiser(tiny_model().eval(), inputs["img_ids"], inputs["txt_ids"], inputs["cond"], cache)
    texts = TextEmbeddings(inputs["txt"], inputs["y_vec"]), TextEmbeddings(-inputs["txt"], -inputs["y_vec"])
    velocity = guided_velocity(denoiser, *texts, guidance or Guidance(5.0, 2.0), 5, 3, has_image=True)
    return solve(euler, velocity, inputs["img"], make_steps(TIMES))


ALL = ("prompt", "negative", "negative_no_image")


def test_a_cache_that_always_runs_changes_nothing():
    cache = LastResidual(every=1)
    assert torch.equal(sampled(cache), sampled())
    assert cache.calls == [(ALL, step) for step in range(5)]


def test_residuals_are_reused_by_branch(monkeypatch):
    cache = LastResidual(every=2)
    reused, exact = sampled(cache), sampled()
    assert cache.runs == 3
    assert not torch.equal(reused, exact)
    assert_close(reused, exact, rtol=0, atol=0.5 * exact.abs().max().item())
    monkeypatch.setattr("opensora.diffusion.velocity.MAX_TOKENS_AT_ONCE", 1)  # branches one by one
    single = LastResidual(every=2)
    assert_close(sampled(single), reused, rtol=1e-4, atol=1e-4)
    assert single.calls == [((name,), step) for step in range(5) for name in ALL]


def test_a_cache_sees_only_the_branches_that_are_run():
    cache = LastResidual(every=1)
    sampled(cache, Guidance(1.0, 1.0))
    assert {branch for branch, _ in cache.calls} == {("prompt",)}


def test_rows_may_be_run_apart():
    """The blocks take any of the rows: half of the batch at a time gives the same."""

    class Halves:
        def around_blocks(self, run, img, txt, vec, rope, branch, step):
            parts = [slice(0, len(img) // 2), slice(len(img) // 2, None)]
            return torch.cat(
                [run(img[part], txt[part], vec[part], type(rope)(*(x[part] for x in rope))) for part in parts]
            )

    assert_close(sampled(Halves()), sampled(), rtol=1e-5, atol=1e-5)


def test_chosen_by_name_and_made_anew_for_every_run(tiny_config, monkeypatch):
    monkeypatch.setattr(STEP_CACHES, "_added", {})
    made = []

    @STEP_CACHES.register("last_residual")
    def make(num_steps):
        made.append((num_steps, LastResidual(every=2)))
        return made[-1][1]

    pipe = VideoPipeline.from_config(tiny_config, num_steps=4)
    exact = pipe("a cat", seed=1)
    cached = [pipe("a cat", seed=1, step_cache="last_residual") for _ in range(2)]
    assert torch.equal(cached[0].latents, cached[1].latents)
    assert not torch.equal(cached[0].latents, exact.latents)
    assert [(steps, cache.runs) for steps, cache in made] == [(4, 2), (4, 2)]


@pytest.mark.parametrize("training", [True, False])
def test_without_a_cache_nothing_is_called(training):
    """The seam costs no memory for gradients and keeps recomputed blocks."""
    model, inputs = tiny_model(grad_ckpt_settings=(1, 1)).train(training), tiny_inputs()
    blocks, inner = [], model.recompute
    model.recompute = lambda block, *args: (blocks.append(block), inner(block, *args))[1]
    through = model(**inputs, around=lambda run, *tokens: run(*tokens))
    assert torch.equal(through, model(**inputs))
    assert len(blocks) == (4 if training else 0)
