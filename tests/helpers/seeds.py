"""What tests draw is the same in every run, alone or among others: random numbers start anew for each of them."""

import os
import random
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

BASE = int(os.environ.get("TEST_SEED", "0"))
"""Another number draws everything anew: a test that then fails has passed by luck."""


def seed(name: str) -> None:
    """Start the random numbers of Python, NumPy and torch (if imported) anew, with a seed of this name."""
    number = zlib.crc32(f"{BASE} {name}".encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - for code that draws from it
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Inside, random numbers are those of this name; afterwards they go on as if nothing had been drawn."""
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch = sys.modules.get("torch")
    torchs = torch.get_rng_state() if torch else None
    seed(name)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002
        if torch:
            torch.set_rng_state(torchs)
