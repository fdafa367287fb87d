"""NaN and infinity end a run at the step or stage where they appear."""

import pytest
import torch

from opensora.diffusion.finite import NotFiniteError, check_result, watched
from opensora.diffusion.pipeline import VideoPipeline
from opensora.models.autoencoder import as_autoencoder
from tests.helpers.decoding import decode_latents


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return VideoPipeline.from_config(tiny_config)


def test_samples_of_a_batch_are_counted():
    batch = torch.zeros(3, 2, 2)
    check_result(batch, "latents", "x")
    batch[1, 0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"latents are not finite .* in 1 of 3 samples of the batch: try x"):
        check_result(batch, "latents", "x")


def test_the_callback_comes_after_the_look():
    seen = []
    on_step = watched(lambda step, total, x: seen.append(step), torch.bfloat16)
    on_step(1, 2, torch.zeros(1, 2))
    with pytest.raises(NotFiniteError, match=r"denoising step 2 of 2 .*--dtype fp32 \(now bfloat16\)"):
        on_step(2, 2, torch.full((1, 2), float("nan")))
    assert seen == [1]


def test_a_step_that_overflows_is_named(pipe, monkeypatch):
    steps = []
    model = pipe.models["model"]

    def overflow(module, args, result):
        steps.append(1)
        return result * float("inf") if len(steps) > 2 else result

    with model.register_forward_hook(overflow), pytest.raises(NotFiniteError, match=r"step [23] of 4 .*--guidance"):
        pipe("a", seed=1)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_embeddings_are_looked_at(pipe, name):
    encoder = pipe.models[name]
    with (
        encoder.register_forward_hook(lambda module, args, result: result * float("nan")),
        pytest.raises(NotFiniteError, match=f"embeddings of the prompts by {name} are not finite"),
    ):
        pipe("a", seed=1)


def test_pixels_and_kept_latents_are_looked_at(pipe, monkeypatch):
    ae = as_autoencoder(pipe.models["ae"])
    latents = torch.zeros(1, 4, 3, 4, 4)
    arguments = (slice(0, 9), torch.device("cpu"), torch.float32)
    assert len(decode_latents(ae, latents, *arguments)) == 1
    with pytest.raises(NotFiniteError, match="latents to decode"):
        decode_latents(ae, latents.fill_(float("nan")), *arguments)
    monkeypatch.setattr(ae, "decode", lambda z: torch.full((1, 3, 9, 32, 32), float("inf")))
    with pytest.raises(NotFiniteError, match="pixels decoded in float32 .*autoencoder"):
        decode_latents(ae, torch.zeros(1, 4, 3, 4, 4), *arguments)
