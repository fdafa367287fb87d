"""Calling a pipeline from Python: diffusers' names, the bar, other devices and precisions, folders and names."""

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from opensora import VideoPipeline
from opensora.acceleration.parallel_context import Axis, ParallelContext
from opensora.utils.errors import UserError


@pytest.fixture(scope="module")
def pipe(tiny_config) -> VideoPipeline:
    return VideoPipeline.from_config(tiny_config, num_steps=2)


def test_diffusers_names_mean_the_same(pipe):
    ours = pipe("a", seed=3, neg="b", num_steps=3, guidance=2.0, height=32, width=48, num_frames=5)
    theirs = pipe(
        prompt="a",
        generator=torch.Generator().manual_seed(3),
        negative_prompt="b",
        num_inference_steps=3,
        guidance_scale=2.0,
        height=32,
        width=48,
        num_frames=5,
    )
    assert theirs.frames[0].shape == (5, 32, 48, 3)
    assert torch.equal(theirs.latents, ours.latents)


def test_an_image_is_the_first_frame(pipe):
    picture = np.full((32, 32, 3), 200, np.uint8)
    ours = pipe(["a", "b"], ref=[picture, None], cond_type="i2v_head", seed=1)
    theirs = pipe(["a", "b"], image=[picture, None], seed=1)
    assert (theirs.plan.cond_type, theirs.plan.has_image) == ("i2v_head", True)
    assert torch.equal(theirs.latents, ours.latents)
    assert pipe("a", image=picture, cond_type="i2v_tail", seed=1).plan.cond_type == "i2v_tail"


@pytest.mark.parametrize(
    ("both", "said"),
    [
        (dict(neg="a", negative_prompt="b"), "neg and negative_prompt are the same argument"),
        (dict(ref="a.png", image="a.png"), "ref and image are"),
        (dict(seed=1, generator=torch.Generator()), "seed and generator are"),
        (dict(num_steps=2, num_inference_steps=2), "num_steps and num_inference_steps are"),
        (dict(guidance=2.0, guidance_scale=1.0), "guidance and guidance_scale are"),
        (dict(generator="7"), "generator: give a torch.Generator"),
        (dict(num_inference_step=2), "num_inference_step is not a known key"),
        (dict(height=32), "height and width must be given together"),
    ],
)
def test_mistakes(pipe, both, said):
    with pytest.raises(UserError, match=said):
        pipe("a", **both)


SMALL = {"num_steps": 1, "height": 32, "width": 32, "num_frames": 5}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"fps": "x"}, "fps 'x' is not a number"),
        ({"fps": True}, "fps True is not a number"),
        ({"seed": 1.5}, r"seed 1\.5 must be a whole number"),
        ({"seed": True}, "seed True is not a number"),
        ({"seed": 2**64}, "seed 18446744073709551616 must be"),
        ({"seed": torch.tensor([1, 2])}, "2 seeds for 1 prompts"),
        ({"neg": 3}, "neg: give a text"),
        ({"neg": ["a", None]}, "neg: give a text"),
        ({"on_step": 3}, "on_step: give a function"),
        ({"prompt": "a\udcff"}, "prompt: .* is no letter"),
        ({"num_steps": np.float32(2.5)}, "num_steps = 2.5: expected integer"),
    ],
)
def test_what_is_of_another_kind_is_named(pipe, wrong, said):
    with pytest.raises(UserError, match=said):
        pipe(**{"prompt": "a", **SMALL, **wrong})


def test_a_text_is_embedded_as_one(pipe):
    one, listed = pipe.encode_prompt("ab"), pipe.encode_prompt(["ab"])
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(listed).values()))
    for wrong in (None, [], [3], {"a"}):
        with pytest.raises(UserError, match="texts: give a text or a list of texts"):
            pipe.encode_prompt(wrong)


def test_numbers_of_numpy_and_torch(pipe):
    plain = pipe("a", seed=3, fps=8.0, guidance=2.0, **SMALL)
    for seed in (np.int64(3), torch.tensor(3), np.array([3])):
        sizes = {key: np.int64(value) for key, value in SMALL.items()}
        assert torch.equal(
            pipe("a", seed=seed, fps=np.float32(8), guidance=np.float64(2), **sizes).latents, plain.latents
        )


def test_a_generator_moves_on(pipe):
    generator = torch.Generator().manual_seed(7)
    seeds = [pipe("a", generator=generator, num_steps=1).seeds[0] for _ in range(3)]
    again = torch.Generator().manual_seed(7)
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert [pipe("a", generator=again, num_steps=1).seeds[0] for _ in range(2)] == seeds[:2]
    two = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert pipe(["a", "b"], generator=two, num_steps=1).seeds == [1, 2]


def test_the_bar_is_for_terminals(pipe, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    steps = []

    def on_step(step, total, latents):
        steps.append((step, total))
        time.sleep(0.11)  # a bar is drawn anew every tenth of a second

    def drawn(**options) -> str:
        stream.truncate(0)
        pipe("a", num_steps=2, on_step=on_step, **options)
        return stream.getvalue()

    assert "2/2" in drawn()
    assert steps == [(1, 2), (2, 2)]
    assert drawn(progress=False) == ""
    stream.isatty = lambda: False
    assert drawn() == ""
    assert "2/2" in drawn(progress=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moved_is_as_loaded_there(tiny_config, dtype):
    loaded = VideoPipeline.from_config(tiny_config, dtype={torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    moved = VideoPipeline.from_config(tiny_config)
    assert moved.to(dtype) is moved
    for name, model in loaded.models.items():
        assert_close(moved.models[name].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert (moved.dtype, moved.cfg.dtype) == (dtype, loaded.cfg.dtype)


def test_moved_back_and_forth(tiny_config):
    pipe = VideoPipeline.from_config(tiny_config, num_steps=1).to("cpu", torch.float64)
    wide = pipe("a", seed=1)
    narrow = pipe.to("fp32")("a", seed=1)
    assert_close(narrow.latents, wide.latents, rtol=1e-3, atol=1e-3)  # float32 rounding through two small models
    assert pipe.device == torch.device("cpu")
    with pytest.raises(UserError, match="unknown device 'nowhere'"):
        pipe.to("nowhere")
    with pytest.raises(UserError, match="dtype torch.int8 is none"):
        pipe.to(torch.int8)
    assert pipe.dtype == torch.float32


def test_divided_models_stay(tiny_config, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "parallel", ParallelContext(sample=Axis(size=2)))
    for call in (lambda: pipe.to("cpu"), lambda: pipe.load_lora("x")):
        with pytest.raises(UserError, match="divided over ranks"):
            call()


def test_from_a_folder(tiny_config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("published")
    folder.mkdir()
    with pytest.raises(UserError, match=r"published is a folder without a config\.py"):
        VideoPipeline.from_pretrained(folder)
    tiny_config_file.rename(folder / "config.py")
    pipe = VideoPipeline.from_pretrained("published", device="cpu", torch_dtype=torch.bfloat16, num_steps=7)
    assert (pipe.dtype, pipe.cfg.sampling_option.num_steps) == (torch.bfloat16, 7)
    with pytest.raises(UserError, match="dtype and torch_dtype are the same argument"):
        VideoPipeline.from_pretrained("published", dtype="fp32", torch_dtype=torch.float32)
    with pytest.raises(UserError, match="config file dmo does not exist.*did you mean demo"):
        VideoPipeline.from_pretrained("dmo")
