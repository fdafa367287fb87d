"""Temporary folders go with their programs, or with the next one."""

import os
import tempfile

import pytest

from opensora.utils.claims import FOLDER_LOCK
from opensora.utils.temporary import TemporaryFolder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_gone_with_its_context(place):
    with TemporaryFolder() as folder:
        assert folder.is_dir()
        assert not [*folder.iterdir()]
        (folder / "a").touch()
    assert not [*place.iterdir()]


def test_what_a_killed_program_left_goes(place):
    child = os.fork()
    if child == 0:
        kept = TemporaryFolder()
        try:
            (kept.path / "a").touch()
        finally:
            os._exit(0)  # nothing is tidied up
    os.waitpid(child, 0)
    left = [*place.iterdir()]
    (place / "opensora-of-others").mkdir()
    with TemporaryFolder() as first, TemporaryFolder() as second:
        assert len(left) == 1
        assert not left[0].exists()
        assert first.is_dir(), "a living program's stays"
        assert second.is_dir()
        assert (first.parent / FOLDER_LOCK).is_file()
    assert [path.name for path in place.iterdir()] == ["opensora-of-others"]
