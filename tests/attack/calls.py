"""Wrong calls from Python, by name: each must end with a UserError that says what is wrong."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

NAN = float("nan")
Calls = Mapping[str, Callable[[], Any]]


def load_config(good: str) -> Calls:
    """Contents of a config that cannot be."""
    from opensora.config import load_config
    from opensora.config.commands import InferenceOptions

    wrong: Mapping[str, Any] = {
        "num_stepss": 3,
        "batch_size": "many",
        "sampling_option": 7,
        "sampling_option.num_steps": NAN,
        "model": {"type": "gone"},
        "model.depth": [1],
        "ae": "text",
        "dataset": {"type": "video"},
        "t5.max_length": None,
        "seed": -1,
        "dtype": "fp8",
        "cond_type": "i2v",
        "plugin_config.tp_size": 0,
    }
    return {
        key: partial(load_config, f"{good}/infer.py", InferenceOptions, {key: value}) for key, value in wrong.items()
    }


def build_module(good: str) -> Calls:
    """Sections that cannot be built."""
    from opensora.registry import MODELS, build_module

    sizes: dict[str, Any] = dict(
        type="flux", in_channels=16, vec_in_dim=8, context_in_dim=8, hidden_size=32, mlp_ratio=2.0, num_heads=2,
        depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=False,
    )  # fmt: skip
    wrong: Mapping[str, dict[str, Any]] = {
        "type": {**sizes, "type": "fluxx"},
        "no type": {"hidden_size": 3},
        "hidden_size": {**sizes, "hidden_size": 33},
        "axes_dim": {**sizes, "axes_dim": [4]},
        "depth": {**sizes, "depth": "x"},
        "theta": {**sizes, "theta": NAN},
        "hiden": {**sizes, "hiden": 1},
        "attn_backend": {**sizes, "attn_backend": "none at all"},
        "block_out_channels": {"type": "hunyuan_vae", "block_out_channels": [0, 1]},
        "latent_channels": {"type": "hunyuan_vae", "latent_channels": 0},
        "from_pretrained": {"type": "text_embedder"},
        "conv_cls": {"type": "N_Layer_discriminator_3D", "conv_cls": "conv2d"},
    }
    return {key: partial(build_module, section, MODELS, device_map="meta") for key, section in wrong.items()}


def save_video(good: str) -> Calls:
    """Frames, places and rates that cannot be written."""
    from opensora.utils.video import save_video

    frames = np.zeros((3, 32, 32, 3), np.uint8)
    wrong: Mapping[str, tuple[Any, Any, Any]] = {
        "fps zero": (frames, "a.mp4", 0),
        "fps negative": (frames, "a.mp4", -3),
        "fps nan": (frames, "a.mp4", NAN),
        "fps infinite": (frames, "a.mp4", float("inf")),
        "fps of text": (frames, "a.mp4", "x"),
        "fps of truth": (frames, "a.mp4", True),
        "fps of ages": (frames, "a.mp4", 1e-9),
        "nowhere": (frames, None, 8),
        "no name": (frames, "", 8),
        "picture ending": (frames, "a.png", 8),
        "no frames": (frames[:0], "a.mp4", 8),
        "two dimensions": (frames[0, :, :, 0], "a.mp4", 8),
        "two channels": (frames[..., :2], "a.mp4", 8),
        "not finite": (np.full((3, 32, 32, 3), NAN, np.float32), "a.mp4", 8),
        "texts": (np.full((3, 32, 32, 3), "x"), "a.mp4", 8),
        "nothing": (None, "a.mp4", 8),
        "ending": (frames, "a.xyz", 8),
        "long": (frames, f"{'n' * 300}.mp4", 8),
        "below a file": (frames, f"{good}/clips.csv/a.mp4", 8),
        "not finite tensor": (torch.full((3, 3, 32, 32), NAN), "a.mp4", 8),
    }
    return {key: partial(save_video, *given) for key, given in wrong.items()}


def read(good: str) -> Calls:
    """Files that cannot be read."""
    from opensora.utils.video import read_image, read_video

    return {
        "picture missing": lambda: read_image("gone.png"),
        "picture of text": lambda: read_image(f"{good}/clips.csv"),
        "picture a folder": lambda: read_image(good),
        "picture long": lambda: read_image("n" * 300),
        "clip missing": lambda: read_video("gone.mp4"),
        "clip of text": lambda: read_video(f"{good}/clips.csv"),
        "clip a folder": lambda: read_video(good),
        "clip long": lambda: read_video("n" * 300),
        "clip with a zero byte": lambda: read_video("a\0.mp4"),
        "picture with a zero byte": lambda: read_image("a\0.png"),
    }


def pipeline(good: str) -> Calls:
    """Calls of a pipeline of tiny random models."""
    from opensora.config import load_config
    from opensora.config.commands import InferenceOptions
    from opensora.diffusion.pipeline import VideoPipeline

    tiny = {
        "model.from_pretrained": None,
        "model.hidden_size": 32,
        "model.num_heads": 2,
        "model.axes_dim": [4, 6, 6],
        "model.depth": 1,
        "model.depth_single_blocks": 1,
        "sampling_option.resolution": None,
        "sampling_option.width": 32,
        "sampling_option.height": 32,
    }
    picture = np.zeros((32, 32, 3), np.uint8)
    i2v: dict[str, Any] = {"prompt": "a", "cond_type": "i2v_head"}
    wrong: Mapping[str, dict[str, Any]] = {
        "prompts nothing": {"prompt": None},
        "prompts number": {"prompt": 3},
        "prompts none": {"prompt": []},
        "prompts of numbers": {"prompt": ["a", 3]},
        "prompts in no order": {"prompt": {"a", "b"}},
        "prompts in a table": {"prompt": {"a": 1}},
        "prompts without end": {"prompt": itertools.repeat("a")},
        "prompts by the million": {"prompt": ["a"] * 10**6},
        "cond_types": {"prompt": "a", "cond_type": ["i2v_head"]},
        "generator": {"prompt": "a", "generator": np.random.default_rng(0)},
        "ref nothing": {**i2v, "ref": ""},
        "ref zero byte": {**i2v, "ref": "a\0.png"},
        "ref long": {**i2v, "ref": "n" * 5000},
        "num_steps zero": {"prompt": "a", "num_steps": 0},
        "num_steps nan": {"prompt": "a", "num_steps": NAN},
        "num_frames": {"prompt": "a", "num_frames": 6},
        "num_frames negative": {"prompt": "a", "num_frames": -5},
        "guidance nan": {"prompt": "a", "guidance": NAN},
        "guidance text": {"prompt": "a", "guidance": "x"},
        "flow_shift": {"prompt": "a", "flow_shift": -1.0},
        "solver": {"prompt": "a", "solver": "gone"},
        "stepss": {"prompt": "a", "stepss": 3},
        "width": {"prompt": "a", "width": -16},
        "seed negative": {"prompt": "a", "seed": -1},
        "seed text": {"prompt": "a", "seed": "x"},
        "seeds too many": {"prompt": "a", "seed": [1, 2]},
        "fps negative": {"prompt": "a", "fps": -3},
        "fps nan": {"prompt": "a", "fps": NAN},
        "cond_type": {"prompt": "a", "cond_type": "i2v"},
        "ref without condition": {"prompt": "a", "ref": picture},
        "ref missing": {**i2v, "ref": "gone.png"},
        "ref number": {**i2v, "ref": 3},
        "ref of one dimension": {**i2v, "ref": np.zeros(3, np.uint8)},
        "ref of five channels": {**i2v, "ref": np.zeros((32, 32, 5), np.uint8)},
        "ref not finite": {**i2v, "ref": np.full((32, 32, 3), NAN, np.float32)},
        "ref of texts": {**i2v, "ref": np.full((32, 32, 3), "x")},
        "ref out of range": {**i2v, "ref": np.full((32, 32, 3), 7.0, np.float32)},
        "ref empty": {**i2v, "ref": np.zeros((0, 0, 3), np.uint8)},
        "ref of nothing": {**i2v, "ref": object()},
    }

    def call(arguments: dict[str, Any]) -> Any:
        return VideoPipeline.from_config(load_config(f"{good}/infer.py", InferenceOptions, tiny))(**arguments)

    return {key: partial(call, arguments) for key, arguments in wrong.items()}
