"""Command lines of the demo's measurements: a config, flags of the tool's own, and keys of the config to override."""

import argparse
from typing import Any

from opensora.utils.errors import UserError
from tools.arguments import Bounded


def config_parser(description: str | None, required: str = "--out DIR") -> argparse.ArgumentParser:
    """A parser of flags without abbreviations, which could be taken for a key of the config.

    Args:
        description: of the tool.
        required: flags that cannot be left out, as the usage line has them.
    """
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        usage=f"%(prog)s CONFIG {required} [options] [--key value ...]",
    )


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmarks that judge the demo's videos: how many of which kind, and their seeds."""
    many: dict[str, Any] = {"type": int, "action": Bounded, "least": 0}
    parser.add_argument(
        "--num_seen", **many, most=10**5, default=25, help="videos of trained combinations, beside held-out ones"
    )
    parser.add_argument("--i2v", **many, most=10**5, default=20, help="videos that start from a picture")
    parser.add_argument("--seed", **many, most=2**40, default=42, help="seed of the first video; the others count up")


def check_counts(args: argparse.Namespace, **least: int) -> None:
    """Refuse a number below the least that its flag takes.

    Raises:
        UserError: names the flag.
    """
    for name, smallest in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < smallest:
                raise UserError(f"--{name} is {value}; it must be at least {smallest}")
