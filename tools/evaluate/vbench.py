"""VBench and VBench-I2V, from prompts to one table beside published rows.

    python tools/evaluate/vbench.py environment                     VBench's own environment, once
    python tools/evaluate/vbench.py models   --cache ckpts/vbench   which of its models are there, how to get the others
    python tools/evaluate/vbench.py prepare  --work runs/vbench [--suite i2v --images FOLDER] [--refine CONFIG]
    python tools/evaluate/vbench.py generate CONFIG --work runs/vbench [--shard 1/4] [--key value ...]
    python tools/evaluate/vbench.py score    --work runs/vbench --cache ckpts/vbench
    python tools/evaluate/vbench.py table    runs/vbench [runs/other ...]

Every step may be stopped and given again: it does what is left. `generate` runs under torchrun too.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.evaluation.vbench.models import FILES, missing, needed
from opensora.evaluation.vbench.scores import SCALES
from tools.arguments import Bounded, Converted, user_path
from tools.evaluate import vbench_steps as steps


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, run: Callable[..., object]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=user_path, required=True, help="folder of this evaluation")


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", type=user_path, default=Path(".venv-vbench"), help="virtual environment of VBench")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=user_path, default=Path("ckpts/vbench"), help="folder of VBench's models")


def _add_dimensions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dimensions", nargs="+", metavar="NAME", help="only these, e.g. scene color")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = _add(commands, "environment", "make the environment that VBench scores in", steps.make_environment)
    _add_env(made)
    made.add_argument("--python", default="python3.10", help="interpreter of the environment")

    models = _add(commands, "models", "list the files that scoring needs", show_models)
    _add_cache(models)
    _add_dimensions(models)

    prepare = _add(commands, "prepare", "write the table of prompts, seeds and names", steps.prepare)
    _add_work(prepare)
    _add_env(prepare)
    _add_dimensions(prepare)
    prepare.add_argument("--suite", choices=sorted(SCALES), default="t2v", help="VBench or VBench-I2V")
    prepare.add_argument("--info", type=user_path, help="VBench's list of prompts, or its checkout; else --env has it")
    prepare.add_argument("--images", type=user_path, help="VBench-I2V: folder of its pictures, e.g. data/crop/16-9")
    prepare.add_argument("--limit", type=int, action=Bounded, least=1, help="only so many prompts, of all dimensions")
    prepare.add_argument("--samples", type=int, action=Bounded, least=1, most=100, default=5, help="videos per prompt")
    prepare.add_argument("--seed", type=int, action=Bounded, least=0, most=2**40, default=42, help="of the first video")
    prepare.add_argument("--augmented", type=user_path, help="text file with a longer prompt per entry of the list")
    prepare.add_argument("--refine", metavar="CONFIG", help="let the language model of this config write prompts out")

    generate = _add(commands, "generate", "make the videos; further --key value pairs go to the config", steps.generate)
    generate.add_argument("config", help="inference config, e.g. configs/diffusion/inference/256px.py")
    _add_work(generate)
    generate.add_argument(
        "--shard", action=Converted, convert=steps.shard, default=(1, 1), metavar="K/N", help="only the K-th of N parts"
    )

    score = _add(commands, "score", "score the videos in VBench's environment", steps.score)
    _add_work(score)
    _add_env(score)
    _add_cache(score)
    _add_dimensions(score)
    score.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where its models work")
    score.add_argument("--gpus", nargs="+", default=["0"], metavar="N", help="one dimension at a time on each")
    score.add_argument(
        "--shard", action=Converted, convert=steps.shard, default=(1, 1), metavar="K/N", help="only the K-th of N parts"
    )
    score.add_argument("--partial", action="store_true", help="score although videos are missing")

    table = _add(commands, "table", "put scores together, beside published ones", steps.table)
    table.add_argument("works", type=user_path, nargs="+", metavar="WORK", help="folders of evaluations of one suite")
    table.add_argument("--out", type=user_path, help="table.csv and table.md go here; else into the first of them")
    return parser


def show_models(args: argparse.Namespace) -> None:
    """Print each file, whether it is there, and how to get it."""
    names = args.dimensions or sorted({name for file in FILES for name in file.dimensions})
    absent = missing(args.cache, names)
    for file in needed(names):
        print(f"{'missing' if file in absent else 'there  '} {args.cache / file.path}  ({', '.join(file.dimensions)})")
    for file in absent:
        print(file.command(args.cache))


def main(argv: list[str] | None = None) -> None:
    """Run one step."""
    args, overrides = make_parser().parse_known_args(argv)
    if args.run is steps.generate:
        args.run(args, overrides, os.environ)
        return
    if overrides:
        make_parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    args.run(args)


if __name__ == "__main__":
    run_main(main)
