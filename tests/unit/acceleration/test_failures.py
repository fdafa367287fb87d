"""What a process that fails leaves for torchrun's report."""

import signal

import pytest

from opensora.acceleration.failures import REPORT, end_after_the_first, report, reported_once
from opensora.utils.errors import UserError
from opensora.utils.main import doing


def test_torchrun_reports_the_line_of_an_error(tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    with pytest.raises(UserError), reported_once({REPORT: str(file)}):
        raise UserError("clips.csv has no column text")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert "traceback : clips.csv has no column text\n" in str(ChildFailedError("train.py", {0: failure}))
    with pytest.raises(ZeroDivisionError), reported_once({REPORT: str(file)}), doing("clips.csv, row 7"):
        print(1 // 0)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=70, error_file=str(file))
    assert "traceback : clips.csv, row 7: ZeroDivisionError: " in str(ChildFailedError("train.py", {0: failure}))


def test_without_torchrun_nothing_is_written(tmp_path):
    report(UserError("wrong"), {})
    report(UserError("wrong"), {REPORT: str(tmp_path / "gone" / "error.json")})
    assert list(tmp_path.iterdir()) == []


def test_the_others_end_after_the_first():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="2"):
            end_after_the_first(2, patience=0)
        assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        signal.signal(signal.SIGTERM, before)
