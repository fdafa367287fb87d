"""The text encoders against reference token ids and outputs."""

import pytest
import torch

from opensora.models.text import HFEmbedder

PROMPTS = ["a cat runs on the grass. 4 motion score. 24 FPS.", "", "the dog"]


@pytest.fixture(scope="module")
def t5(golden_dir):
    return HFEmbedder(str(golden_dir / "text/google/t5-tiny"), max_length=16, shardformer=True)


@pytest.fixture(scope="module")
def clip(golden_dir):
    return HFEmbedder(str(golden_dir / "text/openai/clip-tiny"), max_length=77)


def test_t5(golden, t5):
    file = golden("text_embed")
    assert torch.equal(t5.tokenize(PROMPTS), file.inputs["t5_ids"])
    torch.testing.assert_close(t5(PROMPTS), file.outputs["t5"], rtol=0, atol=1e-4)
    torch.testing.assert_close(t5(PROMPTS, added_tokens=10, seq_align=8), file.outputs["t5_aligned"], rtol=0, atol=1e-4)


def test_clip(golden, clip):
    file = golden("text_embed")
    assert torch.equal(clip.tokenize(PROMPTS), file.inputs["clip_ids"])
    torch.testing.assert_close(clip(PROMPTS), file.outputs["clip"], rtol=0, atol=1e-4)


def test_clip_cleans_text_first(clip):
    assert torch.equal(clip.tokenize(["the  dog &amp; cat\n"]), clip.tokenize(["the dog & cat"]))


def test_frozen_and_in_the_wanted_dtype(golden_dir, t5):
    assert not any(parameter.requires_grad for parameter in t5.parameters())
    assert not t5.model.training
    half = HFEmbedder(str(golden_dir / "text/google/t5-tiny"), max_length=16, torch_dtype=torch.bfloat16)
    assert half(PROMPTS).dtype == half.dtype == torch.bfloat16
    expected = t5(PROMPTS)
    assert (half(PROMPTS).float() - expected).norm() < 3e-2 * expected.norm()
