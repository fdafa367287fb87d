"""Fields of a request, and what they do to the config."""

import pytest

from opensora.config import load_config
from opensora.config.commands import ServeOptions
from opensora.models.autoencoder import LatentSpec
from opensora.serving.request import BadField, GenerationRequest

SPEC = LatentSpec((4, 8, 8), True)


def settings(tiny_config, **fields):
    cfg = load_config(tiny_config, ServeOptions)
    return GenerationRequest.read({"prompt": "a", **fields}).settings(cfg, SPEC)


def test_texts_of_a_form_and_values_of_json_are_the_same():
    form = {"prompt": "none", "num_frames": "9", "guidance_scale": "2.5", "seed": "7", "refine_prompt": "false"}
    json = {"prompt": "none", "num_frames": 9, "guidance_scale": 2.5, "seed": 7, "refine_prompt": False}
    assert GenerationRequest.read(form) == GenerationRequest.read(json)
    assert GenerationRequest.read(form).prompt == "none"


def test_fields_replace_keys_and_the_rest_stays(tiny_config):
    cfg = settings(tiny_config, num_inference_steps=7, guidance_scale=3, fps=12, motion_score=4, seed=2)
    option = cfg.sampling_option
    assert (option.num_steps, option.guidance, option.seed, cfg.fps_save, cfg.motion_score) == (7, 3, 2, 12, "4")
    assert (option.num_frames, option.resolution) == (9, "32px")


def test_sizes_in_pixels_replace_names_and_the_other_way_round(tiny_config):
    option = settings(tiny_config, size="48x32").sampling_option
    assert (option.width, option.height, option.resolution, option.aspect_ratio) == (48, 32, None, None)
    option = settings(tiny_config, aspect_ratio="16:9").sampling_option
    assert (option.width, option.resolution, option.aspect_ratio) == (None, "32px", "16:9")


@pytest.mark.parametrize(("seconds", "frames"), [("1", 9), (2, 17), (0.01, 1), (0.5, 5), ("4", 33)])
def test_seconds_become_the_nearest_length(tiny_config, seconds, frames):
    assert settings(tiny_config, seconds=seconds).sampling_option.num_frames == frames


def test_a_request_is_kept_as_what_it_gives():
    request = GenerationRequest.read({"prompt": "a", "seed": "3", "lora_strength": 1})
    assert request.as_json() == {"prompt": "a", "seed": 3}
    assert GenerationRequest.read(request.as_json()) == request


def test_prompts_of_windows_are_a_list_or_lines():
    request = GenerationRequest.read({"prompt": "a", "next_prompts": "b\n\nc, d\n"})
    assert request == GenerationRequest.read({"prompt": "a", "next_prompts": ["b", "c, d"]})
    assert request.as_json()["next_prompts"] == ("b", "c, d")
    for nothing in (None, "", [], "\n"):
        assert GenerationRequest.read({"prompt": "a", "next_prompts": nothing}) == GenerationRequest.read(
            {"prompt": "a"}
        )


WRONG = [
    ({}, "prompt", "empty"),
    ({"prompt": " \n"}, "prompt", "empty"),
    ({"prompt": ["a"]}, "prompt", "expected text"),
    ({"prompt": "a\0"}, "prompt", "NUL"),
    ({"prompt": "\ud800"}, "prompt", "surrogates"),
    ({"prompt": "a", "num_frame": 3}, "num_frame", "did you mean num_frames"),
    ({"prompt": "a", "num_frames": "many"}, "num_frames", "expected integer"),
    ({"prompt": "a", "num_frames": 2.5}, "num_frames", "expected integer"),
    ({"prompt": "a", "num_frames": 10**9}, "num_frames", "at most"),
    ({"prompt": "a", "seed": -1}, "seed", "at least 0"),
    ({"prompt": "a", "seed": True}, "seed", "expected integer"),
    ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale", "finite"),
    ({"prompt": "a", "guidance_scale": "1e999"}, "guidance_scale", "finite"),
    ({"prompt": "a", "size": "big"}, "size", "width x height"),
    ({"prompt": "a", "size": "0x0"}, "size", "width x height"),
    ({"prompt": "a", "size": "32x32", "width": 3, "height": 3}, "size", "say the same"),
    ({"prompt": "a", "width": 32}, "width", "together"),
    ({"prompt": "a", "width": 32, "height": 32, "resolution": "32px"}, "width", "or resolution"),
    ({"prompt": "a", "seconds": 0}, "seconds", "above 0"),
    ({"prompt": "a", "seconds": 1, "num_frames": 9}, "seconds", "say the same"),
    ({"prompt": "a", "solver": "gone"}, "solver", "expected one of"),
    ({"prompt": "a", "cond_type": "i2v"}, "cond_type", "expected one of"),
    ({"prompt": "a", "next_prompts": ["b", " "]}, "next_prompts", "as a list or a line each"),
    ({"prompt": "a", "next_prompts": {"b": 1}}, "next_prompts", "as a list or a line each"),
    ({"prompt": "a", "next_prompts": "b\n" * 257}, "next_prompts", "257 texts; at most 256"),
    ({"prompt": "a", "next_prompts": ["b\0"]}, "next_prompts", "NUL"),
    ({"prompt": "a", "reference": "x"}, "reference", "did you mean references"),
    ({"prompt": "a", "lora_strength": 99}, "lora_strength", "at most 10"),
]


@pytest.mark.parametrize(("fields", "field", "message"), WRONG)
def test_what_is_wrong_is_named(fields, field, message):
    with pytest.raises(BadField, match=message) as caught:
        GenerationRequest.read(fields)
    assert caught.value.field == field
