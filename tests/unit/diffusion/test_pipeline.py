"""VideoPipeline on tiny random models."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.decode import DecodeMemoryError
from opensora.diffusion.offload import on_device
from opensora.diffusion.pipeline import VideoPipeline
from opensora.models.autoencoder import Autoencoder
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return wake(VideoPipeline.from_config(tiny_config))


def wake(pipe: VideoPipeline) -> VideoPipeline:
    """A fresh model ignores its condition (those weights start at zero); let it listen."""
    nn.init.normal_(pipe.models["model"].cond_in.weight, generator=torch.Generator().manual_seed(0))
    return pipe


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:30, 20:40] = (250, 60, 20)
    return picture


def test_documented_example(tiny_config_file, tmp_path):
    pipe = VideoPipeline.from_config(tiny_config_file, num_steps=2)
    result = pipe("a red circle moving right", seed=42)
    save_video(result.frames[0], tmp_path / "circle.mp4", fps=8)
    assert result.frames[0].shape == (9, 32, 32, 3)
    assert result.frames[0].dtype == np.uint8
    assert result.latents.shape == (1, 4, 3, 4, 4)
    assert result.texts == ["a red circle moving right. 8 FPS."]
    assert result.seeds == [42]
    assert set(result.timings) == {"text", "references", "denoise", "decode"}
    assert result.plan.num_steps == 2


def test_same_prompt_and_seed_whatever_the_batch(pipe, picture):
    alone = pipe("a blue square", seed=3)
    batch = pipe(["a red circle", "a blue square", "a blue square"], seed=[1, 3, 4])
    assert_close(batch.latents[1], alone.latents[0], rtol=0, atol=1e-4)
    assert not torch.allclose(batch.latents[2], alone.latents[0], atol=1e-2)
    given = pipe("a blue square", ref=picture, cond_type="i2v_head", seed=3)
    mixed = pipe(["a blue square", "a blue square"], ref=[None, picture], cond_type="i2v_head", seed=3)
    assert_close(mixed.latents[0], alone.latents[0], rtol=0, atol=1e-4)
    assert_close(mixed.latents[1], given.latents[0], rtol=0, atol=1e-4)


def test_picture_is_in_the_latents_of_every_sample(pipe, picture):
    result = pipe(["a", "b"], ref=[picture, picture[::-1]], cond_type="i2v_loop", seed=[5, 6])
    for index, frames in enumerate((picture, picture[::-1])):
        (refs,) = pipe.encode_references([[frames]], result.plan, [5 + index])
        assert_close(result.latents[index, :, 0], refs[0][:, 0])
        assert_close(result.latents[index, :, -1], refs[1][:, 0])


def test_references_from_files(pipe, picture, tmp_path):
    path = save_image(picture, tmp_path / "a.png")
    from_file = pipe("a", ref=str(path), cond_type="i2v_head", seed=0)
    assert_close(from_file.latents, pipe("a", ref=picture, cond_type="i2v_head", seed=0).latents)
    clip = save_video(np.stack([picture] * 40), tmp_path / "a.mp4", 8)
    result = pipe("a", ref=clip, cond_type="v2v_head", seed=0, num_frames=41, num_steps=1)
    assert result.frames[0].shape[0] == 41
    assert result.plan.has_image
    with pytest.raises(UserError, match=r"reference too short: .*a\.mp4 has 40 frames, v2v_tail_easy needs 65"):
        pipe("a", ref=clip, cond_type="v2v_tail_easy", num_frames=81)
    with pytest.raises(UserError, match=r"v2v_head with num_frames=9: .* at least 37 frames"):
        pipe("a", ref=clip, cond_type="v2v_head")


def test_options_of_a_call_do_not_stay(pipe):
    image = pipe("a", num_frames=1, num_steps=1, resolution="64px", aspect_ratio="16:9", seed=0)
    assert image.frames[0].shape == (1, 48, 80, 3)
    assert pipe("a", seed=0).frames[0].shape == (9, 32, 32, 3)
    with pytest.raises(UserError, match="num_step"):
        pipe("a", num_stepz=3)


def test_explicit_size_goes_before_resolution(pipe):
    assert pipe("a", height=30, width=50, num_steps=1, num_frames=1).frames[0].shape == (1, 32, 64, 3)


def test_progress_and_cancelling(pipe):
    class Cancelled(Exception):
        pass

    seen = []

    def on_step(step, total, latents):
        seen.append((step, total, tuple(latents.shape)))
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        pipe("a", on_step=on_step)
    assert seen == [(1, 4, (1, 4, 3, 4, 4)), (2, 4, (1, 4, 3, 4, 4))]


def test_suffixes_and_negative_prompt(pipe):
    plain = pipe("a cat", seed=1, num_steps=1)
    assert pipe("a cat", seed=1, fps=24, motion_score=4, num_steps=1).texts == ["a cat. 24 FPS. 4 motion score."]
    assert not torch.equal(pipe("a cat", seed=1, neg="blurry", num_steps=1).latents, plain.latents)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_frames": 10}, r"num_frames=10: .*the nearest is 9 \(or 13\)"),
        ({"aspect_ratio": "5:4"}, r"unknown aspect_ratio '5:4' .*16:9"),
        ({"ref": np.zeros((8, 8, 3), np.uint8)}, "cond_type is t2v; i2v_head"),
        ({"ref": "nowhere.png", "cond_type": "i2v_head"}, r"image not found: nowhere\.png"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seed": -1}, "whole number"),
        ({"motion_score": "much"}, "neither a number"),
        ({"motion_score": "dynamic"}, "give a number"),
        ({"prompt": {"a": 1}}, "give a text or a list of texts"),
        ({"prompt": {"a", "b"}}, "give a text or a list of texts"),
        ({"cond_type": ["i2v_head"]}, "unknown cond_type"),
        ({"generator": np.random.default_rng(0)}, "give a torch.Generator"),
        ({"ref": "a\0.png", "cond_type": "i2v_head"}, "image not found"),
        ({"ref": "n" * 5000, "cond_type": "i2v_head"}, "image not found"),
        ({"motion_score": 99}, "motion_score 99 must be at least 0 and at most 15"),
        ({"motion_score": -1}, "at most 15"),
        *(
            ({"ref": nothing, "cond_type": "i2v_head"}, "ref of prompt 1 is empty: cond_type i2v_head")
            for nothing in ("", " ; ", [], ())
        ),
        ({"image": ""}, "ref of prompt 1 is empty"),
        ({"prompt": ["a", "b"], "ref": ["a.png", ""], "cond_type": "i2v_head"}, "ref of prompt 2 is empty"),
    ],
)
def test_bad_calls(pipe, call, message):
    with pytest.raises(UserError, match=message):
        pipe(**{"prompt": "a", **call})


def test_a_condition_without_references_is_said(pipe, caplog):
    assert pipe("a", cond_type="i2v_head", num_steps=1, num_frames=5).plan.cond_type == "t2v"
    assert "no reference for cond_type i2v_head, making a t2v video" in caplog.text


def test_references_that_are_not_used_are_said(pipe, caplog):
    pictures = [np.zeros((32, 32, 3), np.uint8)] * 2
    pipe("a", cond_type="i2v_head", ref=pictures, num_steps=1, num_frames=5)
    assert "prompt 1: cond_type i2v_head uses 1 of the 2 references" in caplog.text


@pytest.mark.parametrize("wrong", [3, None, [1]])
def test_what_is_no_config(wrong):
    with pytest.raises(UserError, match="give a path, the name of a shipped config"):
        VideoPipeline.from_config(wrong)


def test_places_that_cannot_be(pipe):
    for place in ("", None, 3, "n" * 300):
        with pytest.raises(UserError, match="no name of a file or folder|the name has 300 bytes"):
            pipe.save_pretrained(place)
    with pytest.raises(UserError, match="3 is no id of a repository"):
        pipe.push_to_hub(3)
    with pytest.raises(UserError, match="strength 'x' is not a number"):
        pipe.load_lora("adapter", "x")


def test_a_motion_score_of_a_config_is_seen_before_weights(tiny_config):
    with pytest.raises(UserError, match=r"config: motion_score 16 must be"):
        VideoPipeline.from_config(tiny_config, motion_score=16)


def test_offload_keeps_results_and_places(tiny_config):
    plain, offloaded = (
        wake(VideoPipeline.from_config(tiny_config, offload=value))("a", seed=2) for value in (False, True)
    )
    assert_close(plain.latents, offloaded.latents, rtol=0, atol=0)


def test_offload_is_undone_after_an_error():
    module = nn.Linear(2, 2)
    meta = torch.device("meta")
    weight = module.weight.data_ptr()

    def work():
        with on_device(module, meta, offload=True):
            assert module.weight.is_meta
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert module.weight.data_ptr() == weight
    with on_device(module, meta, offload=False):
        assert not module.weight.is_meta


class PictureAutoencoder(nn.Module, Autoencoder):
    """Stands in for an image autoencoder: latents [B, 4, 1, h, w] to pixels [B, 3, 1, 8h, 8w]."""

    compression, is_causal, latent_channels = (1, 8, 8), False, 4
    encode_stored = get_last_layer = None  # not asked for

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2).tanh()


@pytest.fixture(scope="module")
def picture_pipe(tiny_config):
    """Makes a picture first, then a video from it."""
    image_model = {**tiny_config["model"], "cond_embed": False, "guidance_embed": True, "fused_qkv": True}
    cfg = load_config(
        {**tiny_config, "use_t2i2v": True, "img_flux": image_model, "img_resolution": "64px"}, InferenceOptions
    )
    sections = {"model": cfg.model, "ae": cfg.ae, "t5": cfg.t5, "clip": cfg.clip, "img_flux": cfg.img_flux}
    models = {name: build_module(section, MODELS) for name, section in sections.items()}
    return wake(VideoPipeline({**models, "img_flux_ae": PictureAutoencoder()}, cfg, torch.device("cpu"), torch.float32))


def test_picture_first_then_video(picture_pipe):
    steps = []
    result = picture_pipe(
        "a", seed=4, on_step=lambda step, total, latents: steps.append((step, total, len(latents[0, 0])))
    )
    assert result.images[0].shape == (64, 64, 3), "the picture has its own resolution"
    assert result.frames[0].shape == (9, 32, 32, 3)
    assert result.plan.cond_type == "i2v_head"
    assert steps == [*((step, 8, 1) for step in range(1, 5)), *((step, 8, 3) for step in range(5, 9))]
    (refs,) = picture_pipe.encode_references([[result.images[0]]], result.plan, [4])
    assert_close(result.latents[0, :, 0], refs[0][:, 0])


def test_pictures_are_handed_out_before_their_videos(picture_pipe, picture):
    """With the texts they were made of; samples that bring references of their own need none."""
    events = []
    make = {"seeds": [4], "negatives": [""], "image_texts": ["a"], "on_images": lambda images: events.extend(images)}
    result = picture_pipe.make(
        ["a. 8 FPS."], [[]], "i2v_tail", **make, on_step=lambda step, total, latents: events.append(step)
    )
    assert [event for event in events if isinstance(event, int)] == [*range(1, 9)]
    assert events[4] is result.images[0], "after the picture's steps"
    assert result.plan.cond_type == "i2v_tail", "the picture takes the place that the condition gives"
    np.testing.assert_array_equal(events[4], picture_pipe.make_images(["a"], [4])[0])
    events.clear()
    assert picture_pipe.make(["a"], [[picture]], "i2v_head", **make).images == []
    assert events == []


def test_latents_survive_a_failed_decode(tiny_config, monkeypatch):
    pipe = VideoPipeline.from_config(tiny_config, num_steps=1)
    tilings = []

    def decode(z):
        tilings.append(pipe.models["ae"].tiling.use_spatial)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(pipe.models["ae"], "decode", decode)
    with pytest.raises(DecodeMemoryError, match="not enough memory to decode") as caught:
        pipe("a", seed=0)
    assert caught.value.latents.shape == (1, 4, 3, 4, 4)
    assert tilings == [False, True], "tiles are tried"
    assert pipe.models["ae"].tiling.use_spatial is False


def test_loras_and_their_strength(tiny_config, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = wake(VideoPipeline.from_config(tiny_config))
    before = pipe.models["model"].double_blocks[0].img_attn.proj.weight.clone()
    changes = []
    for number, width in enumerate((2, 3)):
        settings = peft.LoraConfig(r=width, lora_alpha=4, target_modules=["proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(VideoPipeline.from_config(tiny_config).models["model"], settings)
        layer = tuned.base_model.model.double_blocks[0].img_attn.proj
        changes.append(4 / width * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        tuned.save_pretrained(tmp_path / f"style{number}")
    styles = [f"{tmp_path}/style0@0.5", f"{tmp_path}/style1"]

    one = VideoPipeline.from_config(tiny_config, pretrained_lora_path=styles[1]).models["model"]
    assert_close(one.double_blocks[0].img_attn.proj.weight, before + changes[1])
    merged, beside = (
        wake(VideoPipeline.from_config(tiny_config, pretrained_lora_path=styles, merge_lora=merge))
        for merge in (True, False)
    )
    assert_close(merged.models["model"].double_blocks[0].img_attn.proj.weight, before + 0.5 * changes[0] + changes[1])
    assert_close(beside.models["model"].double_blocks[0].img_attn.proj.base_layer.weight, before)
    made = [each("a", seed=1).latents for each in (pipe, merged, beside)]
    assert_close(made[2], made[1], rtol=0, atol=1e-4)
    assert not torch.allclose(made[0], made[1], atol=1e-3)
    with pytest.raises(UserError, match="no adapter there"):
        VideoPipeline.from_config(tiny_config, pretrained_lora_path=str(tmp_path))
