"""The prompts of VBench and VBench-I2V in the layout that their scorer reads, and the table that generation reads."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from opensora.utils.errors import UserError, shorten
from opensora.utils.paths import read_text

SAMPLES = 5  # videos per prompt that the scorer looks for
SEED_STRIDE = 100  # between prompts: seeds stay the same when more videos of each are made
INFO = {"t2v": Path("vbench/VBench_full_info.json"), "i2v": Path("vbench2_beta_i2v/vbench2_i2v_full_info.json")}
GET = {
    "t2v": "`vbench.py environment` installs it, or `git clone https://github.com/Vchitect/VBench` has it",
    "i2v": "`git clone https://github.com/Vchitect/VBench` has it (the installed package does not)",
}
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a suite.

    Attributes:
        index: its place in the whole list, from 0.
        text: as VBench words it; files are named after it.
        dimensions: what it is scored on.
        image: file name of the picture to start from, empty for text to video.
    """

    index: int
    text: str
    dimensions: tuple[str, ...]
    image: str = ""

    def name(self, sample: int) -> str:
        """Name of a video in the folder that the scorer reads."""
        return f"{self.text}-{sample}.mp4"

    def stem(self, sample: int) -> str:
        """Name of the same video where it is made: prompts may be too long for everything that lies beside it."""
        return f"{self.index:04d}-{sample}"


def find_info(suite: str, places: Iterable[Path]) -> Path:
    """The list of prompts of a suite.

    Args:
        suite: ``t2v`` or ``i2v``.
        places: the file itself, a checkout of VBench, or a virtual environment that VBench is installed in.

    Raises:
        UserError: none of the places has it; says where to get it.
    """
    tried = []
    for place in places:
        tried.append(str(place))
        inside = sorted(place.glob(f"lib/python*/site-packages/{INFO[suite]}"))
        for path in (place, place / INFO[suite], *inside):
            if path.is_file():
                return path
    raise UserError(
        f"{INFO[suite].name}, VBench's list of prompts, is not in {shorten(tried) or 'any place given'}; {GET[suite]}, "
        "then --info PATH"
    )


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a list of prompts, as they are.

    Raises:
        UserError: the file is damaged or something else; names the entry.
    """
    try:
        entries = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path}: expected a list of prompts, each with prompt_en and dimension (VBench_full_info.json)"
        )
    for number, entry in enumerate(entries):
        good = isinstance(entry, dict) and isinstance(entry.get("prompt_en"), str) and entry["prompt_en"].strip()
        if not good or not isinstance(entry.get("dimension"), list) or "/" in entry["prompt_en"]:
            raise UserError(f"{path}, entry {number}: expected prompt_en (a file name) and dimension (a list)")
    return entries


def read_suite(entries: Sequence[Entry]) -> list[Prompt]:
    """The prompts of a list, each once, with all that they are scored on."""
    found: dict[str, Prompt] = {}
    for index, entry in enumerate(entries):
        text, earlier = str(entry["prompt_en"]), found.get(str(entry["prompt_en"]))
        dimensions = dict.fromkeys([*(earlier.dimensions if earlier else ()), *entry["dimension"]])
        first = earlier.index if earlier else index
        found[text] = Prompt(first, text, tuple(dimensions), str(entry.get("image_name", "")))
    return list(found.values())


def choose(
    prompts: Sequence[Prompt], dimensions: Sequence[str] | None = None, limit: int | None = None
) -> list[Prompt]:
    """Some of the prompts: those of some dimensions, and of these at most ``limit``, spread evenly over them.

    Raises:
        UserError: a dimension that no prompt has.
    """
    known = list(dict.fromkeys(name for prompt in prompts for name in prompt.dimensions))
    if unknown := [name for name in dimensions or () if name not in known]:
        raise UserError(f"--dimensions {shorten(unknown)}: this suite has {', '.join(known)}")
    wanted = list(dimensions or known)
    left = [prompt for prompt in prompts if set(prompt.dimensions) & set(wanted)]
    if limit is None or limit >= len(left):
        return left
    chosen: dict[int, Prompt] = {}
    queues = [[prompt for prompt in left if name in prompt.dimensions] for name in wanted]
    while len(chosen) < limit:
        for queue in queues:
            fresh = next((prompt for prompt in queue if prompt.index not in chosen), None)
            if fresh is not None and len(chosen) < limit:
                chosen[fresh.index] = fresh
    return sorted(chosen.values(), key=lambda prompt: prompt.index)


def sample_seed(seed: int, prompt: Prompt, sample: int) -> int:
    """Seed of a video: its own for every one of a suite, and the same in every subset and with any sharding."""
    return seed + SEED_STRIDE * prompt.index + sample


def prompt_table(
    prompts: Sequence[Prompt],
    samples: int,
    seed: int,
    images: Path | None = None,
    refined: Mapping[str, Mapping[str, str]] | None = None,
) -> pd.DataFrame:
    """The table that generation reads, one row per video, all prompts once before any again.

    Args:
        prompts: of a suite.
        samples: videos of each.
        seed: of the first video, see :func:`sample_seed`.
        images: folder of the pictures that videos start from (VBench-I2V).
        refined: for a prompt's text, the columns ``refined`` and ``image_text`` if they are to be used.
    """
    rows = []
    for sample in range(samples):
        for prompt in prompts:
            row = {"name": prompt.stem(sample), "text": prompt.text, "seed": sample_seed(seed, prompt, sample)}
            row |= {"dimensions": ";".join(prompt.dimensions), "file": prompt.name(sample)}
            if images is not None:
                row |= {"ref": str(images / prompt.image), "cond_type": "i2v_head"}
            rows.append({**row, **(refined or {}).get(prompt.text, {})})
    return pd.DataFrame(rows)


def check_images(prompts: Sequence[Prompt], images: Path) -> None:
    """Raise a UserError if pictures of a suite are missing, saying where to get them."""
    missing = [prompt.image for prompt in prompts if not prompt.image or not (images / prompt.image).is_file()]
    if missing:
        raise UserError(
            f"--images {images}: {shorten(missing)} missing; vbench2_beta_i2v/download_data.sh of VBench's checkout "
            "gets them, then give its folder data/crop/16-9 (or the ratio nearest to your videos)"
        )


def entries_of(entries: Sequence[Entry], prompts: Sequence[Prompt]) -> list[Entry]:
    """The entries that belong to some prompts, for a scorer that is to look for no others."""
    texts = {prompt.text for prompt in prompts}
    return [entry for entry in entries if entry["prompt_en"] in texts]


def dimension_lists(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Texts of the prompts of each dimension, as VBench's ``prompts_per_dimension`` has them."""
    lists: dict[str, list[str]] = {}
    for prompt in prompts:
        for name in prompt.dimensions:
            lists.setdefault(name, []).append(prompt.text)
    return lists
