"""The scripts as tests call them, and what they leave behind."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

INFERENCE = Path(__file__).parents[2] / "scripts" / "diffusion" / "inference.py"
DECODE = INFERENCE.with_name("decode.py")


def load_main(script: Path) -> Callable[[list[str]], list[Path]]:
    """``main`` of a script."""
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def files(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_csv(name: str, *rows: dict[str, str]) -> str:
    """A table; returns its name."""
    with Path(name).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return name
