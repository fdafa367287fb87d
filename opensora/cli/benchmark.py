"""Measure where time and memory go: seconds per stage and step, peak memory, forward passes, TFLOP/s.

    opensora benchmark demo --out benchmark.json
    opensora benchmark 256px --random-weights --num_steps 3

All keys of `opensora generate` are taken as well; image conditions get a grey picture. With
--random-weights no file is read: models and text encoders of the config's sizes start from random
weights. Afterwards the sampler is timed against the plain loop of three forward passes per step, at
toy size on the CPU.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from opensora.config import naming_places, parse_config
from opensora.config.commands import InferenceOptions
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.new_files import add_overwrite, check_new
from opensora.utils.terminal import HelpFormatter


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    measured = parser.add_argument_group("what is measured")
    measured.add_argument("--config", help="inference config, which may also be given without the flag")
    measured.add_argument("--random-weights", action="store_true", help="read no weight files")
    measured.add_argument(
        "--full-steps", type=int, default=50, help="extrapolate to this many steps (default: %(default)s)"
    )
    measured.add_argument("--comparison", type=int, default=5, help="runs of the comparison; 0: none (default: 5)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="file for all figures, as JSON")
    add_overwrite(output)
    args, others = parser.parse_known_args(argv)
    if args.out:
        check_new(args.out, args.overwrite)
    cfg = parse_config([*([args.config] if args.config else []), *others], InferenceOptions)
    if args.comparison and args.comparison < 3:
        raise UserError(f"--comparison {args.comparison}: a median needs 3 runs or more (0: no comparison)")
    from opensora.acceleration.devices import pick_device  # after parsing: --help and typos answer at once
    from opensora.benchmark.inference import build_pipeline, column, environment, measure
    from opensora.benchmark.measuring import markdown
    from opensora.benchmark.sampler import compare_samplers
    from opensora.utils.logging import setup_logging

    setup_logging()
    device = pick_device(cfg.device)
    report: dict[str, Any] = {"environment": environment(device, args.random_weights)}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    with naming_places(cfg):
        pipe = build_pipeline(cfg, device, args.random_weights)
    report["inference"] = measure(pipe, cfg.prompt or "raining, sea", args.full_steps)
    del pipe
    print(column(report["inference"]))
    if args.comparison:
        report["comparison"] = [dataclasses.asdict(row) for row in compare_samplers(args.comparison)]
        print(markdown([{k: v for k, v in row.items() if not isinstance(v, list)} for row in report["comparison"]]))
    if args.out:
        write_text(json.dumps(report, indent=2) + "\n", args.out)
