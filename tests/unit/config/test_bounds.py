"""Every number that a training or evaluation config may hold has bounds, and they are kept wherever it comes from."""

import dataclasses
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from opensora.config import load_config, parse_config
from opensora.config.commands import (
    CacheOptions,
    InferenceOptions,
    TrainOptions,
    VaeInferenceOptions,
    VaeStatsOptions,
    VaeTrainOptions,
)
from opensora.config.options import SamplingOption
from opensora.utils.errors import UserError

SCRIPTS = (InferenceOptions, TrainOptions, CacheOptions, VaeTrainOptions, VaeInferenceOptions, VaeStatsOptions)
ELSEWHERE = {("SamplingOption", "seed")}  # check_seed, which knows the row
LOWER = {"least", "above"}


def is_numeric(hint: Any) -> bool:
    """Whether a key holds a number, or a list or dict of them."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType, list, tuple):
        return any(is_numeric(part) for part in inner)
    return is_numeric(inner[1]) if origin is dict else hint in (int, float)


def groups_below(group: type) -> set[type]:
    """A script's option group and those of its plain sections."""
    below = [key.metadata["group"] for key in dataclasses.fields(group) if "group" in key.metadata]
    return {group, *(found for section in below for found in groups_below(section))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_lower_bound(script):
    numbers = [
        (group.__name__, key.name, key.metadata)
        for group in groups_below(script)
        for key in dataclasses.fields(group)
        if key.metadata and is_numeric(get_type_hints(group)[key.name]) and (group.__name__, key.name) not in ELSEWHERE
    ]
    assert len(numbers) >= 7
    assert [(group, name) for group, name, metadata in numbers if not LOWER & metadata.keys()] == []


def test_every_size_of_a_sample_has_an_upper_bound():
    """Nonsense such as a billion steps is refused at once, not computed."""
    unbounded = {"temporal_reduction", "grad_clip", "flow_shift"}  # no work follows from them
    open_ended = {
        key.name
        for group in (InferenceOptions, SamplingOption)
        for key in dataclasses.fields(group)
        if key.metadata and is_numeric(get_type_hints(group)[key.name]) and not {"most", "below"} & key.metadata.keys()
    }
    assert open_ended == unbounded


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling_option.num_steps", 10**9),
        ("num_frames", 4_000_001),
        ("sampling_option.width", 100_000),
        ("num_sample", 10**9),
        ("num_workers", 100_000),
        ("guidance", float("nan")),
        ("t5.max_length", 10**8),
        ("model.depth", 10**9),
        ("patch_size", 0),
        ("num_samples", -1),
    ],
)
def test_nonsense_of_sampling_is_refused(key, value):
    sections = {"t5": {"type": "text_embedder"}, "model": {"type": "flux"}}
    with pytest.raises(UserError, match=rf"{key.rpartition('.')[2]}=.*must be"):
        load_config(sections, InferenceOptions, {key: value})


def test_what_counts_as_a_number():
    numeric = (int, float | None, list[float], tuple[float, float], dict[str, float] | None, list[int] | None)
    assert all(map(is_numeric, numeric))
    assert not any(map(is_numeric, (str | None, bool, list[str], dict[str, Any], dict[str, dict[int, Any]] | None)))


NONSENSE = [
    ("log_every", 0, "at least 1"),
    ("grad_clip", float("nan"), "a finite number"),
    ("optim.lr", float("inf"), "a finite number"),
    ("lr", -1e-4, "at least 0"),
    ("warmup_steps", -1, "at least 0"),
    ("flat_share", 2.0, "below 1"),
    ("num_workers", 100_000, "at most 512"),
    ("batch_size", -3, "at least 1"),
    ("condition_config", {"t2v": -1.0}, "at least 0"),
    ("validation.timesteps", [0.5, 1.0], "below 1"),
    ("samples.fps", 0, "above 0"),
    ("plugin_config.zero_stage", 7, "at most 2"),
    ("dropout_ratio.t5", 1.5, "at most 1"),
    ("seed", 2**63, "at most"),
    ("optim.betas", (0.9, 1.0), "below 1"),
]


@pytest.mark.parametrize(("key", "value", "message"), NONSENSE)
def test_nonsense_is_refused_in_files_and_on_command_lines(key, value, message, tmp_path, write_literal):
    with pytest.raises(UserError, match=rf"{key}=.*must be.*{message}"):
        load_config({}, TrainOptions, {key: value})
    section, _, name = key.rpartition(".")
    path = write_literal(tmp_path / "bad.py", {section: {name: value}} if section else {name: value})
    with pytest.raises(UserError, match=rf"bad.py.*{key}=.*must be.*{message}"):
        parse_config([path], TrainOptions)


def test_nonsense_of_autoencoder_training_is_refused():
    with pytest.raises(UserError, match=r"gen_loss_config\.gen_start=-1: must be at least 0"):
        load_config({"gen_loss_config": {"gen_start": -1}}, VaeTrainOptions)
    with pytest.raises(UserError, match=r"kl_loss_weight=-1\.0: must be at least 0"):
        load_config({"vae_loss_config": {"kl_loss_weight": -1.0}}, VaeTrainOptions)


@pytest.fixture
def write_literal():
    """Writer of a config file from Python values, NaN and infinity among them."""

    def write(path, content):
        lines = [f"{key} = {value!r}" for key, value in content.items()]
        path.write_text("\n".join(["nan, inf = float('nan'), float('inf')", *lines]))
        return str(path)

    return write
