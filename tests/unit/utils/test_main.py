"""How commands end: one line, and a status that says what kind of end it is."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.utils import main
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys, time
from pathlib import Path
from opensora.config import run_main
from opensora.utils.errors import UserError
from opensora.utils.main import doing

def main(argv):
    print("begun", flush=len(sys.argv) > 2)
    {body}

run_main(main)
"""


@pytest.fixture
def command(tmp_path):
    """Runs a script with these lines as its main; gives status, standard output and the lines on standard error."""

    def run(body, *words, stdout=subprocess.PIPE):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(body=body))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, script, *words], env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        return done.returncode, done.stdout, done.stderr.splitlines()

    return run


def test_a_mistake(command):
    assert command('raise UserError("no such clip")') == (2, "begun\n", ["error: no such clip"])


def test_further_lines_of_a_mistake_are_indented_and_none_is_empty():
    text = "one\n\n two\n\tthree\n  four\n"
    assert main._ending(UserError(text), False) == ("error: one\n   two\n  \tthree\n  four", main.MISTAKE)


def test_what_nobody_foresaw_is_one_line(command, tmp_path):
    status, _, lines = command("with doing('t.csv, row 7'), doing('clip a.mp4'): 1 / 0")
    assert status == 70
    (line,) = lines
    assert line.startswith("error: t.csv, row 7: clip a.mp4: ZeroDivisionError: division by zero; the traceback is in ")
    kept = Path(re.search(r"is in (\S+),", line)[1])
    assert kept.parent == tmp_path
    assert "Traceback" in kept.read_text()
    assert "1 / 0" in kept.read_text()


def test_debug_shows_the_traceback(command, tmp_path):
    status, _, lines = command("assert sys.argv[1:] == ['--x', 'y'], sys.argv; 1 / 0", "--x", "--debug", "y")
    assert status == 70
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: ZeroDivisionError: division by zero"
    assert not list(tmp_path.glob("*.traceback.txt"))


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("Path('x' * 300).write_text('')", "x" * 300 + ": File name too long"),
        ("(Path(__file__) / 'a').mkdir()", "script.py/a: Not a directory"),
        ("Path('/').write_text('')", "/: Is a directory"),
        ("open('/dev/full', 'w').write('a' * 10**6)", "No space left on device"),
    ],
)
def test_places_that_cannot_be_written(command, body, line):
    status, _, lines = command(body)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(line)


def test_errors_of_readers_of_clips(command):
    """They come with the traceback of another process in their message."""
    body = (
        "import torch.utils.data as d; B = type('B', (d.Dataset,), {'__getitem__': lambda s, i: (_ for _ in ()).throw("
        "UserError('bad clip')), '__len__': lambda s: 1}); list(d.DataLoader(B(), num_workers=1))"
    )
    status, _, lines = command(body)
    assert (status, lines) == (2, ["error: bad clip"])


@pytest.mark.parametrize("words", [(), ("--now", "a")], ids=["at the end", "at once"])
def test_full_standard_output(command, words):
    with Path("/dev/full").open("w") as full:
        status, _, lines = command("pass", *words, stdout=full)
    assert (status, lines) == (74, ["error: standard output: No space left on device"])


@pytest.mark.parametrize("body", ["pass", "[print('line') for _ in range(100_000)]", "raise SystemExit(0)"])
def test_nobody_reads(command, body):
    reading, writing = os.pipe()
    os.close(reading)
    status, _, lines = command(body, stdout=writing)
    os.close(writing)
    assert (status, lines) == (141, [])


def test_an_error_in_a_thread_is_one_line(command):
    body = """
    import threading
    def fail():
        raise OSError(28, "No space left on device")
    thread = threading.Thread(target=fail, name="writer")
    thread.start()
    thread.join()
"""
    status, _, lines = command(body)
    assert (status, lines) == (0, ["warning: writer has ended: No space left on device"])


FOLDERS = """
    from opensora.utils.temporary import TemporaryFolder
    from opensora.utils.files import write_beside
    with TemporaryFolder():
        write_beside("out.txt", lambda path: (print("on", flush=True), time.sleep(60)))
"""


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, (130, "interrupted\n")), (signal.SIGTERM, (143, ""))], ids=["SIGINT", "SIGTERM"]
)
def test_told_to_end(tmp_path, number, end):
    """Nothing that was being written stays, and no temporary folder."""
    (tmp_path / "script.py").write_text(SCRIPT.format(body=FOLDERS))
    place = tmp_path / "place"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
    words, pipes = [sys.executable, tmp_path / "script.py"], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, cwd=place, text=True, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        assert process.stdout.readline() == "on\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == end
    assert not [*place.iterdir()]
