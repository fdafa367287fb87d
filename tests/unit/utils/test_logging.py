"""What reaches the terminal."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging
from opensora.utils.logging import get_logger, setup_logging
setup_logging()
import bitsandbytes
logging.getLogger("another.package").warning("theirs")
get_logger("opensora.part").info("ours")
"""


def test_only_needless_warnings_of_other_packages_are_left_out():
    """PEFT imports bitsandbytes where it is installed, which warns on a CPU."""
    pytest.importorskip("bitsandbytes")
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300).stderr
    assert "theirs\n" in said
    assert "| INFO | ours\n" in said
    assert "4bit" not in said
