"""Every command on a machine that is at fault: a full disk, one that cannot be written to, little shared memory, an end
in the middle of writing, another of its kind at once, a server that sends a byte now and then.
``python -m tests.attack.faults [PATTERN]`` runs all, as root.

It ends, in time and with one line, or works; what it made before is whole; nothing unfinished is left, at the latest
after the next run.
"""

import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open

from opensora.utils.video import read_video
from tests.attack.inputs import DEMO, copy_writable, run_commands, write_inputs
from tests.attack.runner import LEFTOVER, MESSAGE, MISTAKE, Server, differences, filled, snapshot
from tests.attack.server import KILLED, READ_ONLY, REMOUNT, Order, Outcome
from tests.attack.works import DRIPPED, WORKS, Work
from tests.helpers.dripping import dripping as drip

PATIENCE = 60.0
ROOM = (0, 8, 64)  # KiB that are left on a full disk
PLENTY = "size=256m"
OUTPUT_FULL = 74  # of opensora.utils.main
SHARED = "size=64k"
ENDED = (0, MISTAKE, OUTPUT_FULL)
FILLING = "filling"
MEANT = ("broken.mp4",)  # a clip of tools/data/sample_footage.py that is half of one
MOMENTS = {signal.SIGKILL: 4, signal.SIGTERM: 2, signal.SIGINT: 1}  # of all changes that a work makes
Problems = list[str]


@dataclass
class Bench:
    """Where works are run.

    Attributes:
        server: runs them.
        good: inputs that all of them share.
        place: its folders, made anew for every work.
        ends: how works have ended, for who watches.
        drip: address of the server that drips.
        dripped: when it sent a byte: how long a work waits for it, whatever else the machine does.
        tells: see :class:`Work`, of the one that is run.
        alone: by work, the names that it leaves when nothing is at fault, and how many changes it makes for that.
    """

    server: Server
    good: Path
    place: Path
    ends: list[str] = field(default_factory=list)
    drip: str = ""
    dripped: list[float] = field(default_factory=list)
    tells: int = 0
    alone: dict[str, tuple[set[str], int]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where a work runs."""
        return self.place / "work"

    @property
    def temporary(self) -> Path:
        """Its folder for temporary files."""
        return self.place / "tmp"

    def undisturbed(self, work: Work) -> tuple[set[str], int]:
        """See ``alone``; the work is run once for that."""
        if work.name not in self.alone:
            self.fresh(work)
            outcome = self.run(work)
            assert not outcome.status, self.said()
            changes = len((self.place / "said0.changes").read_bytes())
            self.alone[work.name] = names_of(self.seen()), changes
        return self.alone[work.name]

    def fill(self, place: Path, room: int) -> None:
        """Leave ``room`` KiB on the disk that is mounted at a folder."""
        (self.server.seen(place) / FILLING).write_bytes(bytes(4096))  # a disk of size 0 would be one without end
        used = int(shutil.disk_usage(self.server.seen(place)).used)
        self.mount(place, f"size={used + room * 1024}", REMOUNT)

    def fresh(self, work: Work, disk: str = "") -> None:
        """Empty folders with the copies that a work takes; with ``disk``, its folder is one of its own."""
        self.tells = work.tells
        shutil.rmtree(self.place, ignore_errors=True)
        for path in (self.folder, self.temporary):
            path.mkdir(parents=True)
        if disk:
            self.mount(self.folder, disk)
        for name in work.copies:
            copy_writable(self.good / name, self.server.seen(self.folder) / name)

    def mount(self, place: Path, options: str = "", flags: int = 0) -> None:
        """See :meth:`Server.mount`."""
        wrong = self.server.mount(place, options, flags)
        assert not wrong, f"{place}: {wrong}"

    def order(self, work: Work, again: bool = False, number: int = 0, **more: Any) -> Order:
        """To run a work."""
        places = {"{good}": self.good, "{demo}": DEMO, "{drip}": more.get("hub", "")}
        words = [filled(word, places) for word in (*work.words, *(work.again if again else ()))]
        streams = str(self.place / f"said{number}")
        return Order(work.script, words, str(self.folder), str(self.temporary), PATIENCE, False, streams, **more)

    def run(self, work: Work, again: bool = False, **more: Any) -> Outcome:
        """Run a work."""
        return self.server.run(self.order(work, again, **more))

    def said(self, number: int = 0) -> str:
        """What a work has said last."""
        return (self.place / f"said{number}.err").read_text(errors="replace")

    def seen(self) -> dict[str, str]:
        """All that is in a work's folder."""
        return snapshot(self.server.seen(self.folder))

    # ------------------------------------------------------------------------------------------------------ what holds

    def ending(self, outcome: Outcome, fine: tuple[int, ...] = ENDED, number: int = 0) -> Problems:
        """What is wrong with how a work has ended."""
        said, problems = self.said(number), []
        self.ends.append(f"{outcome.status} {' '.join(said.strip().splitlines()[-1:])}"[:160])
        if outcome.status == KILLED and KILLED not in fine:
            problems.append(f"not ended after {outcome.seconds:.0f} s")
        elif outcome.status not in (*fine, self.tells):
            problems.append(f"exit status {outcome.status}")
        if "Traceback" in said:
            problems.append("a traceback")
        if outcome.status == MISTAKE and not MESSAGE.search(said):
            problems.append("no message")
        return [*problems, *([f"    {said.strip()[-500:]}"] if problems else [])]

    def state(self, before: dict[str, str], done: bool) -> Problems:
        """What is wrong with what a work has left: before it there was something that it had made."""
        after = self.seen()
        problems = [f"lost: {Path(name).name}" for name in before.keys() - after.keys()]
        root = self.server.seen(self.folder)
        for name in differences(before, after):
            whole = Path(name).name not in MEANT
            if whole and name in after and Path(name).is_file() and (wrong := broken(Path(name))):
                problems.append(f"broken: {Path(name).relative_to(root)}: {wrong}")
        return problems + ([] if done else self.unfinished())

    def unfinished(self) -> Problems:
        """What is left of files and folders that were being written."""
        places = (self.server.seen(self.folder), self.temporary)
        return [f"left: {path.name}" for place in places for path in place.rglob("*") if LEFTOVER.fullmatch(path.name)]

    def temporaries(self) -> Problems:
        """What is left of temporary files."""
        left = sorted(path.name for path in self.temporary.iterdir() if path.name != FILLING)
        return [f"left in the temporary folder: {name}" for name in left]


def broken(path: Path) -> str:
    """Why a file is not whole, empty if it is."""
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda file: json.loads(file.read_text()),
        ".mp4": lambda file: read_video(file),
        ".png": lambda file: Image.open(file).load(),
        ".parquet": lambda file: pq.read_table(file),
        ".safetensors": lambda file: safe_open(file, "pt").keys(),
        ".csv": lambda file: file.read_text().endswith("\n") or 1 / 0,
    }
    try:
        readers.get(path.suffix, lambda file: None)(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --------------------------------------------------------------------------------------------------------------- faults


def full_disk(bench: Bench, work: Work, room: int) -> Problems:
    """A run over what an earlier one has made, on a disk where ``room`` KiB are left."""
    bench.fresh(work, PLENTY)
    first = bench.run(work)
    if first.status:
        return bench.ending(first, (0,))
    before = bench.seen()
    bench.fill(bench.folder, room)
    outcome = bench.run(work, again=True)
    return [*bench.ending(outcome), *bench.state(before, False), *bench.temporaries()]


def empty_full_disk(bench: Bench, work: Work, room: int) -> Problems:
    """A first run on a disk that is full."""
    bench.fresh(work, PLENTY)
    bench.fill(bench.folder, room)
    before = bench.seen()
    outcome = bench.run(work)
    return [*bench.ending(outcome), *bench.state(before, False), *bench.temporaries()]


def full_temporary_folder(bench: Bench, work: Work) -> Problems:
    """The folder for temporary files is on a full disk."""
    bench.fresh(work)
    bench.mount(bench.temporary, "size=4k")
    bench.fill(bench.temporary, 0)
    before = bench.seen()
    outcome = bench.run(work)
    return [*bench.ending(outcome), *bench.state(before, False)]


def read_only(bench: Bench, work: Work) -> Problems:
    """A disk that cannot be written to, with what an earlier run has made and without."""
    problems = []
    for earlier in (False, True):
        bench.fresh(work, PLENTY)
        if earlier:
            bench.run(work)
        before = bench.seen()
        bench.mount(bench.folder, flags=REMOUNT | READ_ONLY)
        outcome = bench.run(work, again=True)
        problems += [*bench.ending(outcome), *differences(before, bench.seen()), *bench.temporaries()]
        bench.server.mount(bench.folder)
    return problems


def little_shared_memory(bench: Bench, work: Work) -> Problems:
    """64 KiB of it, as small containers have."""
    bench.fresh(work)
    bench.mount(Path("/dev/shm"), SHARED)
    try:
        return [*bench.ending(bench.run(work)), *bench.unfinished(), *bench.temporaries()]
    finally:
        bench.server.mount(Path("/dev/shm"))


def ended(bench: Bench, work: Work, number: int, moment: float) -> Problems:
    """A signal before one of the changes that a work makes, by its place among them from 0 to 1; then another run,
    after which all is there."""
    names, changes = bench.undisturbed(work)
    if not changes:
        return []
    bench.fresh(work)
    first = bench.run(work, killed=number, moment=round(moment * (changes - 1)))
    problems = bench.ending(first, (0, MISTAKE, 128 + number))
    if number != signal.SIGKILL:
        problems += [*bench.unfinished(), *bench.temporaries()]
    if first.status:
        problems += bench.ending(bench.run(work, again=True), (0,))
    missing = [f"missing: {name}" for name in sorted(names - names_of(bench.seen()))]
    return [*problems, *missing, *bench.state({}, True), *bench.unfinished(), *bench.temporaries()]


def two_at_once(bench: Bench, work: Work) -> Problems:
    """Two of a command in one folder: both work, or the second says who is there; nothing is damaged."""
    alone, _ = bench.undisturbed(work)
    bench.fresh(work)
    before = bench.seen()
    outcomes = bench.server.run_at_once(bench.order(work, number=0), bench.order(work, number=1))
    problems = [each for number, outcome in enumerate(outcomes) for each in bench.ending(outcome, ENDED, number)]
    if all(outcome.status for outcome in outcomes):
        problems.append(f"none of them works: {bench.said(0)[-200:]} {bench.said(1)[-200:]}")
    missing = alone - names_of(bench.seen())
    return [*problems, *(f"missing: {name}" for name in missing), *bench.state(before, False), *bench.temporaries()]


def dripping(bench: Bench, work: Work, part: str) -> Problems:
    """What a work asks others for comes a byte now and then, from the head of an answer on or from its body."""
    bench.fresh(work)
    bench.dripped.clear()
    address = f"{bench.drip}/{part}"
    environment = {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "none", "HF_HOME": str(bench.folder / "hub")}
    environment |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}  # of processes that it starts anew
    outcome = bench.run(work, hub=address, environment=environment)
    seconds = bench.dripped[-1] - bench.dripped[0] if bench.dripped else 0.0
    bench.ends.append(f"waited {seconds:.0f} s of {outcome.seconds:.0f} s")
    late = [f"waited {seconds:.0f} s"] if seconds > PATIENCE else [] if bench.dripped else ["asked nobody"]
    return [*bench.ending(outcome), *late, *bench.unfinished(), *bench.temporaries()]


def names_of(seen: Iterable[str]) -> set[str]:
    """Names of files, without numbers in them (times, processes, jobs)."""
    return {re.sub(r"[0-9a-f]{8,}|\d+", "0", Path(name).name) for name in seen}


def faults(work: Work) -> Iterator[tuple[str, Callable[[Bench], Problems]]]:
    """Every fault, by name."""
    for room in ROOM:
        yield f"full disk, {room} KiB left", partial(full_disk, work=work, room=room)
    yield "full disk from the start", partial(empty_full_disk, work=work, room=0)
    yield "full disk soon", partial(empty_full_disk, work=work, room=12)
    yield "full temporary folder", partial(full_temporary_folder, work=work)
    yield "read-only disk", partial(read_only, work=work)
    yield "little shared memory", partial(little_shared_memory, work=work)
    for number, count in MOMENTS.items():
        for moment in range(count):
            place = (moment + 0.5) / count
            yield f"{number.name} at {place:.0%}", partial(ended, work=work, number=number, moment=place)
    yield "two at once", partial(two_at_once, work=work)


def all_faults() -> Iterator[tuple[str, Callable[[Bench], Problems]]]:
    """Every fault of every work, by name."""
    for work in WORKS:
        for label, fault in faults(work):
            yield f"{work.name}: {label}", fault
    for work in DRIPPED:
        for part in ("head", "body"):
            yield f"{work.name}: dripping {part}", partial(dripping, work=work, part=part)


def make_more(good: Path, server: Server) -> None:
    """Inputs of works that the other tests have no use for."""
    (good / "vbench.json").write_text(json.dumps([{"prompt_en": "a", "dimension": ["scene"]}]))
    words = [str(DEMO / "image_ae.safetensors"), "diffusers", "--norm-groups", "4"]
    order = Order("tools/convert/to_diffusers.py", words, str(good), str(good.parent), 600.0, False)
    assert not server.run(order).status, good.with_name("good.err").read_text()


def main(pattern: str = "") -> None:
    """Run all that a pattern matches, print what does not hold."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, drip(pause=0.5, size=10**6, times=times) as address:
        server, good = Server(), Path(folder) / "good"
        good.mkdir()
        write_inputs(good)
        run_commands(good, server)
        make_more(good, server)
        bench, started, bad, count = Bench(server, good, Path(folder) / "place"), time.monotonic(), 0, 0
        bench.drip, bench.dripped = address, times
        for name, fault in all_faults():
            if not re.search(pattern, name):
                continue
            began = time.monotonic()
            bench.ends.clear()
            try:
                problems = fault(bench)
            except AssertionError as error:  # it does not work at all
                problems = [str(error)]
            bench.server.mount(bench.folder)
            bench.server.mount(bench.temporary)
            bad, count = bad + bool(problems), count + 1
            told = "".join(f"\n    {each}" for each in (*(f"({end})" for end in bench.ends), *problems))
            print(f"{name} ({time.monotonic() - began:.1f} s){told}", flush=True)
        server.close()
    print(f"{count} faults, {bad} do not hold, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
