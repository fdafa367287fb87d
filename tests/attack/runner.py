"""Bad inputs as cases, run one by one through the server, and what must hold of every one of them."""

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.attack.server import AT_WEIGHTS, GIB, KILLED, ROOT, Order, Outcome

SECONDS = 300.0  # of one case, which takes a fraction of one, on a machine that does much else as well
MEMORY = 2 * GIB
MISTAKE = 2
MESSAGE = re.compile(r"^(?:\S+: )?error: ", re.MULTILINE)
LEFTOVER = re.compile(r"\.unfinished-.*|\..+\.(writing|replacing|removing|names)|\.(?!written).+\.lock")
Make = Callable[[Path, Path], None]  # of the good inputs, and of the case: fills the latter


@dataclass(frozen=True)
class Case:
    """A command line with something wrong in it.

    Attributes:
        name: of the test.
        script: see :class:`tests.attack.server.Order`.
        words: its command line; ``{good}`` is the folder of good inputs, ``{case}`` that of the case's own,
            ``{demo}`` that of the demo's weights.
        culprit: what its message must match.
        make: makes the case's own inputs.
        may_pass: it may also be fine (a flipped bit that changes nothing, a large number that is not too large).
        late: it can be known only once weights are read.
        leaves: name of a file with the reasons, which it may leave.
        unmended: why it does not hold yet, if it does not; the survey alone runs it.
    """

    name: str
    script: str
    words: Sequence[str]
    culprit: str
    make: Make | None = None
    may_pass: bool = False
    late: bool = False
    leaves: str = ""
    unmended: str = ""


@dataclass
class Result:
    """What became of a case, and what is wrong with that."""

    case: Case
    outcome: Outcome
    said: str
    problems: list[str] = field(default_factory=list)


class Server:
    """The process that forks, see :mod:`tests.attack.server`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attack.server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server has ended with status {self.process.wait()}"
        return json.loads(line)

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(self, order: Order) -> Outcome:
        """Run one order."""
        return self.run_at_once(order)[0]

    def run_at_once(self, *orders: Order) -> list[Outcome]:
        """Run orders, all at the same time."""
        return [Outcome(**found) for found in self._ask({"orders": [asdict(order) for order in orders]})]

    def mount(self, place: Path, options: str = "", flags: int = 0) -> str:
        """See :func:`tests.attack.server.mount`."""
        return self._ask({"mount": str(place), "options": options, "flags": flags})

    def seen(self, place: Path) -> Path:
        """A place as the process sees it, which has mounts of its own."""
        return Path(f"/proc/{self.process.pid}/root{place}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


def attack(server: Server, case: Case, good: Path, place: Path) -> Result:
    """Run a case in an empty folder, and look at what it says, leaves and changes.

    Args:
        good: inputs that all cases share.
        place: where the case gets its folder, which goes again.
    """
    folder, own, temporary = (place / name for name in ("work", "own", "tmp"))
    for path in (folder, own, temporary):
        path.mkdir(parents=True)
    if case.make is not None:
        case.make(good, own)
    places = {"{good}": good, "{case}": own, "{demo}": ROOT / "assets" / "demo"}
    words = [filled(word, places) for word in case.words]
    before, shared = snapshot(own), signature(good)
    outcome = server.run(Order(case.script, words, str(folder), str(temporary), SECONDS, not case.late))
    said = (place / "work.err").read_text(errors="replace")
    result = Result(case, outcome, said)
    result.problems = [
        *ending_problems(case, outcome, said),
        *(f"changed: {name}" for name in differences(before, snapshot(own))),
        *(f"changed: {name}" for name in differences(shared, signature(good))),
        *left_problems(case, outcome, folder, temporary),
    ]
    for path in place.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(place)
    return result


def filled(word: str, places: Mapping[str, Path]) -> str:
    """A word of a command line with the places that it names."""
    for name, path in places.items():
        word = word.replace(name, str(path))
    return word


def ending_problems(case: Case, outcome: Outcome, said: str) -> list[str]:
    """What is wrong with an exit status and a message."""
    problems = []
    if outcome.status == KILLED:
        problems.append(f"killed after {outcome.seconds:.0f} s")
    if outcome.memory > MEMORY:
        problems.append(f"took {outcome.memory / GIB:.1f} GiB")
    if "Traceback" in said:
        problems.append("a traceback")
    fine = (0, AT_WEIGHTS) if case.may_pass else ()
    if outcome.status in fine:
        return problems
    if outcome.status != MISTAKE:
        what = "went on to weights" if outcome.status == AT_WEIGHTS else f"exit status {outcome.status}"
        return [*problems, what]
    found = MESSAGE.search(said)
    message = said[found.start() :] if found else ""
    if not message:
        problems.append("no message")
    elif any(not line.startswith("  ") for line in message.splitlines()[1:]):
        problems.append("more than a message of one line")
    if not re.search(case.culprit, message):
        problems.append(f"does not name {case.culprit}")
    return problems


def left_problems(case: Case, outcome: Outcome, folder: Path, temporary: Path) -> list[str]:
    """What is left behind: nothing at all after a mistake, nothing unfinished otherwise."""
    if outcome.status == AT_WEIGHTS:
        return []
    left = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    if outcome.status == 0:
        left = [path for path in left if LEFTOVER.fullmatch(path.name)]
    named = [f"left: {path}" for path in left if path.name != case.leaves]
    return named + [f"left in the temporary folder: {path.name}" for path in sorted(temporary.iterdir())]


def snapshot(folder: Path) -> dict[str, str]:
    """Names, modes and contents of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) and mode & 0o400 else ""
        found[str(path)] = f"{mode:o} {content}"
    return found


def signature(folder: Path) -> dict[str, str]:
    """Names, sizes and times of everything below a folder."""
    return {str(path): f"{(s := path.lstat()).st_size} {s.st_mtime_ns}" for path in folder.rglob("*")}


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names of which something has changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
