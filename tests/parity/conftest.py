"""Fixtures of the parity tests: the reference tensors of the original model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


class Golden(NamedTuple):
    """Tensors of one reference file by section, plus its constructor and call arguments."""

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    meta: dict


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the reference files; the test is skipped where they are not at hand."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("reference tensors (../shared/golden) are not at hand")
    return folder


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> Callable[[str], Golden]:
    """Loader: ``golden("mmdit_video")`` reads ``mmdit_video.safetensors``."""

    def load(name: str) -> Golden:
        sections: dict[str, dict[str, Tensor]] = {key: {} for key in ("weights", "inputs", "outputs", "grads")}
        with safe_open(golden_dir / f"{name}.safetensors", "pt") as file:
            meta = json.loads(file.metadata()["meta"])
            for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
                section, rest = key.split(".", 1)
                sections[section][rest] = file.get_tensor(key)
        return Golden(**sections, meta=meta)

    return load
