"""The table of step caches: exact without one, approximate with one."""

from tools.benchmark import step_caches


def test_as_a_command(tiny_config_file, capsys):
    words = ["--quick", "--thresholds", "9", "--resolution", "64px", "--num_frames", "5"]
    step_caches.main(["--config", str(tiny_config_file), *words])
    out = capsys.readouterr().out
    assert "2 videos, 1 of them from a picture" in out
    plain, cached = [line.split(" | ") for line in out.splitlines() if line.startswith(("| none", "| first"))]
    assert plain[4:8] == ["99", "99", "0", "0"]
    assert float(cached[5]) < 99
    blocks = [line for line in out.partition("one single block of width 256")[2].splitlines() if line[:3] == "| 0"]
    changes, errors = zip(*(map(float, line.strip("| ").split(" | ")[1:]) for line in blocks), strict=True)
    assert list(changes) == sorted(changes)
    assert list(errors) == sorted(errors)
    assert 0 < errors[0] < 0.05
    assert cached[6:8] == ["0.5", "0.25"]  # two of four steps, in these one of two blocks
