"""The table of solvers: errors against a reference, forwards as planned."""

from opensora.diffusion.pipeline import VideoPipeline
from tools.benchmark import solvers


def test_errors_and_forwards(tiny_config):
    pipe = VideoPipeline.from_config(tiny_config)
    runs = [("euler", 6), ("euler", 3), *((name, 3) for name in solvers.OF_THE_FLOW if name != "euler")]
    exact, *others = solvers.compare(pipe, solvers.embed(pipe, 2), runs, ("euler", 6))
    assert (exact.error, exact.median_error, exact.psnr, exact.forwards) == (0, 0, 99, 12)
    assert [(row.solver, row.forwards) for row in others] == [("euler", 6), ("heun", 10), ("ab2", 6)]
    assert all(row.error > 0 and row.psnr < 99 for row in others)


def test_as_a_command(tiny_config_file, capsys):
    solvers.main(["--config", str(tiny_config_file), "--quick", "--num_frames", "5"])
    out = capsys.readouterr().out
    assert "3 prompts, guidance 5.0, against 40 steps of euler" in out
    assert "| solver | steps | forwards | error |" in out
