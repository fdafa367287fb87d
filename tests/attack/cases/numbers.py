"""Every numeric key of every option group, with numbers that cannot be."""

import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from opensora.config.commands import (
    CacheOptions,
    InferenceOptions,
    TrainOptions,
    VaeInferenceOptions,
    VaeStatsOptions,
    VaeTrainOptions,
)
from opensora.datasets.config import VideoTextConfig
from opensora.models.hunyuan_vae.config import HunyuanVAEConfig
from opensora.models.mmdit.config import MMDiTConfig
from opensora.models.text.config import TextEmbedderConfig
from opensora.models.vae.config import DiscriminatorConfig
from tests.attack.cases import commands
from tests.attack.cases.commands import Command
from tests.attack.runner import Case
from tools.data.chain import STAGES
from tools.data.options import with_sections

SECTIONS = {
    "dataset": VideoTextConfig,
    "model": MMDiTConfig,
    "ae": HunyuanVAEConfig,
    "t5": TextEmbedderConfig,
    "clip": TextEmbedderConfig,
    "discriminator": DiscriminatorConfig,
}
GROUPS: tuple[tuple[Command, type, dict[str, type]], ...] = (
    (commands.INFERENCE, InferenceOptions, SECTIONS),
    (commands.TRAIN, TrainOptions, SECTIONS),
    (commands.VAE_TRAIN, VaeTrainOptions, {**SECTIONS, "model": HunyuanVAEConfig}),
    (commands.CACHE, CacheOptions, SECTIONS),
    (commands.VAE_INFERENCE, VaeInferenceOptions, {**SECTIONS, "model": HunyuanVAEConfig}),
    (commands.VAE_STATS, VaeStatsOptions, {**SECTIONS, "model": HunyuanVAEConfig}),
    (commands.DATA, with_sections(STAGES), {}),
)
ABSENT = ("lr_scheduler", "img_flux", "img_flux_ae")  # sections of no consequence here, or without a type
NEGATIVE = (  # may be
    *("keep_n_latest", "guidance", "guidance_img", "end_index", "shift_factor", "scale_factor", "logvar_init"),
)
# nan, inf and text are never right, -1 hardly ever; the others are, in places, and must then do no harm
VALUES = {"nan": "nan", "infinite": "inf", "negative": "-1", "zero": "0", "huge": "1" + 30 * "0", "text": "many"}
PERHAPS = ("zero", "huge")
# what a section needs besides, to be looked at
BESIDES = {"validation": ("--validation.data_path={good}/clips.csv",), "samples": ("--samples.prompts=a",)}


def numbers_in(hint: Any) -> int:
    """How many numbers a key of this type takes, 0 for none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return max(map(numbers_in, inner))
    if origin is tuple and Ellipsis not in inner:
        return sum(map(numbers_in, inner))
    return numbers_in(inner[0]) if origin in (list, tuple) else int(hint in (int, float))


def numeric_keys(group: type, sections: dict[str, type], prefix: str = "") -> Iterator[tuple[type, str, int]]:
    """Class, dotted name and count of numbers of every numeric key of a group and of its sections."""
    hints = get_type_hints(group)
    for key in dataclasses.fields(group):
        below = key.metadata.get("group") or (sections.get(key.name) if "registry" in key.metadata else None)
        if below is not None and key.name not in ABSENT:
            yield from numeric_keys(below, {}, f"{prefix}{key.name}.")
        elif key.metadata and "no_effect" not in key.metadata and numbers_in(hints[key.name]):
            yield _owner(group, key.name), f"{prefix}{key.name}", numbers_in(hints[key.name])


def _owner(group: type, key: str) -> type:
    """The class that a key was first written down in."""
    return [base for base in group.__mro__ if key in vars(base).get("__annotations__", {})][-1]


def cases() -> list[Case]:
    """Each key once, with the first command that has it."""
    found, seen = [], set()
    for command, group, sections in GROUPS:
        for owner, key, count in numeric_keys(group, sections):
            name = key.rpartition(".")[2]
            if (owner, name) in seen:
                continue
            seen.add((owner, name))
            for label, value in VALUES.items():
                if label == "negative" and name in NEGATIVE:
                    continue
                culprit = f"{name}|{key.partition('.')[0]}" if label in PERHAPS else name
                besides = BESIDES.get(key.partition(".")[0], ())
                words = (*command.words, *besides, f"--{key}={','.join([value] * count)}")
                found.append(
                    Case(f"{command.script}-{key}-{label}", command.script, words, culprit, may_pass=label in PERHAPS)
                )
    return found
