"""Command lines of the demo's measurements: a config, flags of the tool's own, and keys of the config to override."""

import argparse

from opensora.utils.errors import UserError


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
