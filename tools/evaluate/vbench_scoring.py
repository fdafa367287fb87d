"""The step ``score`` of ``vbench.py``: VBench's scorers, one process per dimension, in their own environment."""

import argparse
import json
import os
import queue
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.evaluation.vbench.models import check_models
from opensora.evaluation.vbench.scores import SCALES
from opensora.utils.errors import UserError, shorten

SCORER = Path(__file__).with_name("vbench_scorer.py")
# VBench must not be shadowed by vbench.py beside the scorer, nor by the working folder: neither is on the path
CALL = "import sys, runpy; sys.path[:] = [p for p in sys.path if p]; runpy.run_path(sys.argv[1])['main'](sys.argv[2])"
RATIOS = ("1-1", "8-5", "7-4", "16-9")


def results_path(work: Path, dimension: str) -> Path:
    """Where VBench writes the scores of a dimension."""
    return work / "scores" / f"{dimension}_eval_results.json"


def read_results(work: Path, dimension: str) -> tuple[float, list[Any]] | None:
    """The score of a dimension and those of its videos; None where it is not (wholly) there."""
    try:
        score, videos = json.loads(results_path(work, dimension).read_text("utf-8"))[dimension]
        return float(score), list(videos)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def score(args: argparse.Namespace) -> None:
    """Score the dimensions that have no score yet.

    Raises:
        UserError: videos, models or the environment are missing; or a scorer failed, with the place of its log.
    """
    from tools.evaluate.vbench_steps import link_videos, part, read_prompts

    rows = read_prompts(args.work)
    settings = json.loads((args.work / "settings.json").read_text("utf-8"))
    if link_videos(args.work, rows) < len(rows) and not args.partial:
        lacking = [file for file in rows["file"] if not (args.work / "videos" / file).is_file()]
        raise UserError(
            f"{len(lacking)} of {len(rows)} videos are missing ({shorten(lacking, 2)}); finish `generate`, or "
            "--partial scores what is there, which is not comparable"
        )
    present = {name for cell in rows["dimensions"] for name in cell.split(";")}
    known = [name for name in SCALES[settings["suite"]].dimensions if name in present]
    if unknown := [name for name in args.dimensions or () if name not in known]:
        raise UserError(f"--dimensions {shorten(unknown)}: this evaluation has {', '.join(known)}")
    wanted = args.dimensions or known
    left = [name for name in wanted if read_results(args.work, name) is None]
    left = [left[index] for index in part(len(left), args.shard)]
    check_models(args.cache, left)
    python = args.env / "bin" / "python"
    if left and not python.exists():
        raise UserError(f"--env {args.env}: no environment there; `vbench.py environment --env {args.env}` makes it")
    run_all(left, args.gpus, lambda name, gpu: run_one(args, settings, name, gpu))
    print(f"{len(wanted)} dimensions, {len(left)} of them scored now: {args.work / 'scores'}")


def run_all(names: list[str], gpus: list[str], run: Callable[[str, str], str | None]) -> None:
    """Run the scorers, one at a time on each GPU; the others go on where one fails.

    Raises:
        UserError: says which failed, and where their logs are.
    """
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)

    def work(name: str) -> str | None:
        gpu = free.get()
        try:
            return run(name, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        failed = [line for line in pool.map(work, names) if line]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} scorers failed; give the command again when mended\n" + "\n".join(failed)
        )


def run_one(args: argparse.Namespace, settings: dict[str, Any], name: str, gpu: str) -> str | None:
    """Score one dimension; a line about what went wrong, if anything did."""
    work = args.work.absolute()
    place, out, log = work / "scorer", work / "scores", work / "scores" / f"{name}.log"
    for folder in (place, out):
        folder.mkdir(exist_ok=True)
    task = {
        "suite": settings["suite"],
        "info": str(work / "info.json"),
        "videos": str(work / "videos"),
        "out": str(out),
    }
    task |= {"dimension": name, "device": args.device}
    if settings["suite"] == "i2v":
        task["ratio"] = _link_images(place, Path(settings["images"]).absolute())
    _link(place / "models", args.cache.absolute() / "dreamsim")  # where DreamSim looks, in its working folder
    command = [str(args.env.absolute() / "bin" / "python"), "-c", CALL, str(SCORER), json.dumps(task)]
    with log.open("w", encoding="utf-8") as file:
        environment = _environment(args.cache.absolute(), gpu)
        status = subprocess.run(command, cwd=place, env=environment, stdout=file, stderr=file, check=False).returncode
    if status == 0 and read_results(work, name) is not None:
        return None
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
    return f"  {name} (status {status}): {last[:200]}; {log}"


def _environment(cache: Path, gpu: str) -> dict[str, str]:
    """Variables of a scorer: all models from the cache, none from the network, and nothing of this program's own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {
        "VBENCH_CACHE_DIR": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TORCH_HOME": str(cache / "torch"),
        "CUDA_VISIBLE_DEVICES": gpu,
    }


def _link_images(place: Path, images: Path) -> str:
    """Show the pictures of VBench-I2V where its scorer looks, below its working folder; their ratio."""
    if images.name not in RATIOS:
        raise UserError(f"--images {images}: VBench-I2V's folders are named {', '.join(RATIOS)}")
    _link(place / "vbench2_beta_i2v" / "data" / "crop" / images.name, images)
    return images.name


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # from an earlier dimension, or one that is scored at the same time
        path.symlink_to(target)
