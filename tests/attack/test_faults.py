"""Disks that are full or read-only, ends in the middle of writing, two at once: a few commands that take little; all of
them with ``python -m tests.attack.faults``."""

import signal

import pytest

from opensora.cli.main import COMMANDS
from tests.attack import faults
from tests.attack.faults import Bench
from tests.attack.server import ROOT
from tests.attack.works import WITHOUT, WORKS

QUICK = ("data table", "convert lora", "convert lora peft", "demo picture", "meta", "shard")
QUICKEST = ("data table", "convert lora peft", "shard")


@pytest.fixture
def bench(server, good, tmp_path):
    """Folders for a work; what was mounted there goes again."""
    made = Bench(server, good, tmp_path / "place")
    yield made
    for place in (made.folder, made.temporary):
        server.mount(place)


def work_of(name):
    return next(work for work in WORKS if work.name == name)


def needs_mounts(bench):
    wrong = bench.server.mount(bench.good / "footage", "size=4k")
    if wrong:
        pytest.skip(f"no file systems can be mounted: {wrong}")
    bench.server.mount(bench.good / "footage")


@pytest.mark.parametrize("name", QUICK)
def test_a_full_disk(bench, name):
    needs_mounts(bench)
    assert faults.full_disk(bench, work_of(name), 0) == []


@pytest.mark.parametrize("name", QUICKEST)
def test_a_disk_that_cannot_be_written_to(bench, name):
    needs_mounts(bench)
    assert faults.read_only(bench, work_of(name)) == []


@pytest.mark.parametrize("name", QUICKEST)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_in_the_middle(bench, name, number):
    assert faults.ended(bench, work_of(name), number, 0.5) == []


@pytest.mark.parametrize("name", QUICKEST)
def test_two_at_once(bench, name):
    assert faults.two_at_once(bench, work_of(name)) == []


def test_every_command_has_a_work_or_a_reason():
    files = [path for place in ("scripts", "tools") for path in (ROOT / place).rglob("*.py")]
    scripts = {str(path.relative_to(ROOT)) for path in files if "__main__" in path.read_text(encoding="utf-8")}
    run = {work.script for work in WORKS}
    assert scripts - run == WITHOUT.keys()
    read = "".join((ROOT / script).read_text(encoding="utf-8") for script in run)
    modules = {command.module for command in COMMANDS.values()}
    assert {module for module in modules if module not in read and f"{module.replace('.', '/')}.py" not in run} == set()
