"""What reaches the terminal."""

import importlib.util
import logging

import pytest

from opensora.utils.logging import LogFile
from tests.helpers.forks import Program

PROGRAM = """
import logging
from opensora.utils.logging import get_logger, setup_logging
setup_logging()
import sys
assert "bitsandbytes" not in sys.modules
import bitsandbytes
logging.getLogger("another.package").warning("theirs")
get_logger("opensora.part").info("ours")
"""


def test_only_needless_warnings_of_other_packages_are_left_out(tmp_path):
    """PEFT imports bitsandbytes where it is installed, which warns on a CPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    program = Program(tmp_path / "program.py", folder=tmp_path)
    assert program.ended() == 0, program.said
    assert "theirs\n" in program.said
    assert "| INFO | ours\n" in program.said
    assert "4bit" not in program.said


def test_a_log_on_a_full_disk_loses_lines_and_says_so_once(capfd):
    full = LogFile("/dev/full")
    for _ in range(2):
        full.emit(logging.makeLogRecord({"msg": "a line"}))
    full.close()
    assert capfd.readouterr().err == "warning: /dev/full: No space left on device; it lacks lines\n"
