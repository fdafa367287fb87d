"""The steps of ``vbench.py``: each reads what the one before it left in the folder of the evaluation.

``prompts.csv`` (a row per video), ``info.json`` (the entries of VBench's list), ``dimensions/NAME.txt``,
``settings.json``, ``samples/`` (as inference.py writes), ``videos/`` (the same under VBench's names, nothing else),
``scores/NAME_eval_results.json``.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from opensora.datasets.table import read_table, write_table
from opensora.evaluation.vbench.suite import (
    Prompt,
    check_images,
    choose,
    dimension_lists,
    entries_of,
    find_info,
    prompt_table,
    read_entries,
    read_suite,
)
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError, shorten
from opensora.utils.files import write_beside, write_text
from tools.evaluate.vbench_results import table
from tools.evaluate.vbench_scoring import score
from tools.outputs import check_place

__all__ = ["generate", "link_videos", "make_environment", "prepare", "score", "shard", "table"]

HERE = Path(__file__).parent
DETECTRON = "git+https://github.com/facebookresearch/detectron2.git"
REFINED = "refined.json"
REFINING = ".refining.csv"  # prompts that the language model is asked for now
SAVE_EVERY = 20  # prompts, while a language model writes them out


def shard(text: str) -> tuple[int, int]:
    """``2/8`` as (2, 8).

    Raises:
        UserError: anything but two whole numbers, the first from 1 to the second.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard {text}: expected K/N, the K-th of N parts, such as 1/4")
    return int(found[1]), int(found[2])


def part(count: int, shard: tuple[int, int]) -> range:
    """Rows of a part: all parts together are all rows, each once."""
    k, n = shard
    return range(count * (k - 1) // n, count * k // n)


def make_environment(args: argparse.Namespace) -> None:
    """A virtual environment with VBench's own versions of everything.

    Raises:
        UserError: the interpreter is missing, or an installation failed.
    """
    check_place(args.env, "--env", folder=True)
    if not shutil.which(args.python):
        raise UserError(f"--python {args.python} is not there; VBench's versions are for Python 3.10")
    pip = [str(args.env / "bin" / "python"), "-m", "pip", "install", "--no-deps"]
    for command in (
        [args.python, "-m", "venv", str(args.env)],
        [*pip, "-r", str(HERE / "vbench.txt")],
        [*pip, "--no-build-isolation", DETECTRON],  # it builds against the torch that is there
    ):
        print(" ".join(command), flush=True)
        if (status := subprocess.run(command, check=False).returncode) != 0:
            raise UserError(f"`{' '.join(command)}` ended with status {status}; what it printed says why")


def prepare(args: argparse.Namespace) -> None:
    """Write what the other steps read.

    Raises:
        UserError: no list of prompts, no pictures, or the folder is of other settings.
    """
    check_place(args.work, "--work", folder=True)
    path = find_info(args.suite, [args.info] if args.info else [args.env])
    entries = read_entries(path)
    prompts = choose(read_suite(entries), args.dimensions, args.limit)
    if args.suite == "i2v":
        if args.images is None:
            raise UserError("--suite i2v: give --images, the folder of VBench-I2V's pictures")
        check_images(prompts, args.images)
    elif args.images is not None:
        raise UserError("--images: only VBench-I2V (--suite i2v) starts from pictures")
    if args.augmented and args.refine:
        raise UserError("--augmented and --refine both write prompts out; give one")
    with claimed(args.work, advice="wait for it or give another --work"):
        (args.work / REFINING).unlink(missing_ok=True)  # of a run that was killed
        _claim(args.work, _settings(args, path, len(prompts)))
        _write_prepared(args, entries, prompts)


def _write_prepared(args: argparse.Namespace, entries: list[dict[str, Any]], prompts: list[Prompt]) -> None:
    refined = _augmented(args.augmented, entries) if args.augmented else {}
    if args.refine:
        refined = _refine(args, prompts)
    images = args.images.absolute() if args.images else None
    write_text(json.dumps(entries_of(entries, prompts), indent=1) + "\n", args.work / "info.json")
    for name, texts in dimension_lists(prompts).items():
        write_text("\n".join(texts) + "\n", args.work / "dimensions" / f"{name}.txt")
    rows = prompt_table(prompts, args.samples, args.seed, images, refined)
    write_table(rows, args.work / "prompts.csv")
    print(f"{len(prompts)} prompts, {len(rows)} videos: {args.work / 'prompts.csv'}")


def _settings(args: argparse.Namespace, path: Path, count: int) -> dict[str, Any]:
    return {
        "suite": args.suite,
        "info": str(path),
        "prompts": count,
        "samples": args.samples,
        "seed": args.seed,
        "images": str(args.images) if args.images else None,
        "augmented": str(args.augmented) if args.augmented else None,
        "refine": args.refine,
    }


def _claim(work: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of an evaluation; videos of other ones must not be mixed with it."""
    path = work / "settings.json"
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else settings
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged; delete it, or give another --work")
    if found != settings:
        differing = [key for key in settings if found.get(key) != settings[key]]
        raise UserError(f"{work} was prepared with another {', '.join(differing)}; give another --work")
    write_text(json.dumps(settings, indent=2) + "\n", path)


def _augmented(path: Path, entries: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """VBench's own longer prompts (``prompts/augmented_prompts``), a line per entry of its list.

    Raises:
        UserError: another number of lines.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) != len(entries):
        raise UserError(
            f"--augmented {path}: {len(lines)} lines for {len(entries)} entries; give the file of this list"
        )
    return {entry["prompt_en"]: {"refined": line.strip()} for entry, line in zip(entries, lines) if line.strip()}


def _refine(args: argparse.Namespace, prompts: list[Prompt]) -> dict[str, dict[str, str]]:
    """Prompts written out by the language model that a config names, once for all machines; kept as they come."""
    from opensora.config import parse_config
    from opensora.config.commands import InferenceOptions
    from opensora.generation.refine import make_asker, refine_requests
    from opensora.generation.requests import read_requests

    cfg = parse_config([args.refine, "--refine-prompt", "True"], InferenceOptions)
    ask, path = make_asker(cfg, os.environ)(), args.work / REFINED
    known: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    left = [prompt for prompt in prompts if prompt.text not in known]
    images = args.images.absolute() if args.images else None
    for first in range(0, len(left), SAVE_EVERY):
        batch = args.work / REFINING
        write_table(prompt_table(left[first : first + SAVE_EVERY], 1, args.seed, images), batch)
        table = parse_config(
            [args.refine, "--refine-prompt", "True", "--dataset.data-path", str(batch)], InferenceOptions
        )
        for request in refine_requests(read_requests(table, args.work), cfg, ask):
            found = {"refined": request.refined, "image_text": request.image_text}
            if request.refined:
                known[request.text] = {key: value for key, value in found.items() if value}
        batch.unlink()
        write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", path)
    failed = [prompt.text for prompt in prompts if prompt.text not in known]
    if failed:
        raise UserError(f"{len(failed)} prompts were not written out ({shorten(failed, 2)}); give the command again")
    return known


def read_prompts(work: Path) -> pd.DataFrame:
    """The rows of an evaluation.

    Raises:
        UserError: it was not prepared.
    """
    if not (work / "prompts.csv").is_file():
        raise UserError(f"--work {work}: no prompts.csv; run `vbench.py prepare --work {work}` first")
    return read_table(work / "prompts.csv", as_text=True)


def generate(args: argparse.Namespace, overrides: list[str], environment: Mapping[str, str]) -> None:
    """Make the videos of a part that are not there, as inference.py does, and link them under VBench's names."""
    from opensora.acceleration.devices import pick_device
    from opensora.acceleration.failures import reported_once
    from opensora.acceleration.parallel_context import shutdown
    from opensora.acceleration.torchrun import Torchrun
    from opensora.config import parse_config
    from opensora.config.commands import InferenceOptions
    from opensora.generation.outputs import output_folder
    from opensora.generation.run import generate as make
    from opensora.utils.logging import setup_logging

    rows = read_prompts(args.work)
    chosen = part(len(rows), args.shard)
    if not chosen:
        print(f"part {args.shard[0]} of {args.shard[1]} has no videos")
        return
    own = ["--dataset.data-path", str(args.work / "prompts.csv"), "--save-dir", str(args.work / "samples")]
    own += ["--start-index", str(chosen.start), "--end-index", str(chosen.stop), "--skip-existing", "True"]
    own += ["--num-sample", "1"]
    with reported_once(environment):
        cfg = parse_config([args.config, *overrides, *own], InferenceOptions)
        _check_place_of_videos(args.work, output_folder(cfg))
        processes = Torchrun.read(environment)
        setup_logging(rank=processes.rank)
        make(cfg, pick_device(cfg.device, processes.local_rank), processes, environment)
        if processes.rank == 0:
            write_text(str(output_folder(cfg).relative_to(args.work)) + "\n", args.work / "made_in.txt")
            linked = link_videos(args.work, rows)
            print(f"{linked} of {len(rows)} videos are there: {args.work / 'videos'}")
    shutdown()


def _check_place_of_videos(work: Path, folder: Path) -> None:
    note = work / "made_in.txt"
    if note.is_file() and (made := note.read_text("utf-8").strip()) != str(folder.relative_to(work)):
        raise UserError(f"--work {work} has videos of another size ({made}); give another --work")


def link_videos(work: Path, rows: pd.DataFrame) -> int:
    """Put the videos that are there into ``videos/`` under VBench's names; how many they are."""
    note = work / "made_in.txt"
    if not note.is_file():
        raise UserError(f"--work {work}: no videos yet; run `vbench.py generate CONFIG --work {work}` first")
    made, folder = work / note.read_text("utf-8").strip(), work / "videos"
    folder.mkdir(exist_ok=True)
    count = 0
    for name, file in zip(rows["name"], rows["file"], strict=True):
        source, target = made / f"{name}.mp4", folder / file
        if not source.is_file():
            continue
        count += 1
        if target.exists() and target.samefile(source):
            continue
        write_beside(target, partial(_link, source))
    return count


def _link(source: Path, empty: Path) -> None:
    try:
        empty.unlink()
        empty.hardlink_to(source)
    except OSError:  # another file system, or one without such links
        shutil.copyfile(source, empty)
