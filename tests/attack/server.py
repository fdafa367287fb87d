"""A process that has imported everything, and forks one per command line: each costs milliseconds, not seconds.

It reads one JSON object per line, orders (:class:`Order`) to run at once or something to :func:`mount`, and answers
with one: outcomes (:class:`Outcome`), or what went wrong.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import itertools
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
AT_WEIGHTS = 99  # exit status of a process that came to read the weights of a model
KILLED = 137
GIB = 2**30
ADDRESSES = 24 * GIB  # of one process
NEW_MOUNTS, RECURSIVE, PRIVATE, DETACH = 0x20000, 0x4000, 1 << 18, 2  # of unshare(2), mount(2) and umount2(2)
READ_ONLY, REMOUNT = 1, 32
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")  # of sys.audit
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
BUSY = 4  # how many times as slow as a machine of its own the one of the tests may be
IMPORTED = (
    *("torch", "numpy", "pandas", "pyarrow.parquet", "safetensors.torch", "av", "PIL.Image", "polars", "peft"),
    *("opensora.training.diffusion.trainer", "opensora.training.vae.trainer", "opensora.training.diffusion.cache"),
    *("opensora.generation.run", "opensora.generation.decode_files", "opensora.evaluation.reconstruction"),
    *("opensora.evaluation.latents", "opensora.models.hunyuan_vae", "opensora.models.mmdit", "opensora.models.dc_ae"),
    *("opensora.models.text.embedder", "opensora.models.vae.autoencoder_2d", "opensora.utils.video"),
    *("tools.data.run", "tools.data.table", "tools.convert.mmdit", "tests.attack.calls"),
)
FROM_TRANSFORMERS = ("CLIPTextModel", "CLIPTokenizer", "T5EncoderModel", "T5Tokenizer")


@dataclass
class Order:
    """A command line to run.

    Attributes:
        script: path of a script from the repository's root, or the name of a function in ``tests.attack.calls``.
        words: its command line; or the folder of good inputs, and the name of a call.
        folder: where it runs; standard output and error go to ``<folder>.out`` and ``<folder>.err``.
        temporary: its folder for temporary files.
        seconds: after which it is killed.
        stop_at_weights: end it with ``AT_WEIGHTS`` instead of letting it read weights.
        streams: start of the names of its streams; else ``folder``.
        killed: the signal that it gets in the moment before it changes something in its folders, 0 for none.
        moment: which of its changes that is, from 0. Their number is written to ``<streams>.changes``.
        hub: address that stands for the Hugging Face hub; none: there is no network.
        environment: variables that it has besides.
    """

    script: str
    words: list[str]
    folder: str
    temporary: str
    seconds: float
    stop_at_weights: bool = True
    streams: str = ""
    killed: int = 0
    moment: int = 0
    hub: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How it ended: exit status, seconds, and what it added to the server's memory at most, in bytes."""

    status: int
    seconds: float
    memory: int


def load_script(place: str) -> ModuleType:
    """A script as a module; of a tool under a name that processes which it starts anew know as well."""
    if place.startswith("tools/"):
        return importlib.import_module(place.removesuffix(".py").replace("/", "."))
    name = place.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / place)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def import_everything() -> None:
    """Once, in the server."""
    for name in IMPORTED:
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in FROM_TRANSFORMERS:
        getattr(transformers, name)
    for place in ("scripts/diffusion/*.py", "scripts/vae/*.py", "scripts/cnv/*.py", "tools/*/*.py"):
        for path in sorted(ROOT.glob(place)):
            if path.name != "__init__.py" and "run_main(main)" in path.read_text(encoding="utf-8"):
                load_script(str(path.relative_to(ROOT)))
    importlib.import_module("torch").set_num_threads(1)
    for ending in weakref.finalize._registry:  # type: ignore[attr-defined]
        ending.atexit = False  # of what was imported, as torch's operators: a child would copy most of it to end it
    gc.collect()
    gc.freeze()  # children that look for garbage do not copy all of it


def fork(*orders: Order) -> list[Outcome]:
    """Run orders at once, each in a process of its own."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pids = []
    for order in orders:
        pids.append(os.fork())
        if pids[-1] == 0:
            run(order)
    return [_wait(order, pid, started, before) for order, pid in zip(orders, pids)]


def _wait(order: Order, pid: int, started: float, before: int) -> Outcome:
    handle = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    in_time = bool(waiting.poll(order.seconds * 1000))
    while not in_time and not _is_late(order, pid, time.monotonic() - started):
        in_time = bool(waiting.poll(1000))
    with contextlib.suppress(ProcessLookupError):  # what it has started goes as well
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(handle)
    code = os.waitstatus_to_exitcode(status) if in_time else KILLED
    return Outcome(code if code >= 0 else 128 - code, time.monotonic() - started, (usage.ru_maxrss - before) * 1024)


def _is_late(order: Order, pid: int, seconds: float) -> bool:
    """Whether a process has had its time: also on machines that do much else as well, where it has hardly worked."""
    worked = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return seconds > BUSY * order.seconds or worked / os.sysconf("SC_CLK_TCK") > order.seconds / BUSY


def run(order: Order) -> None:
    """In the forked process: never returns."""
    os.setsid()
    end_with_the_server()
    status: Any = 1
    try:
        prepare(order)
        main = _call(order) if "/" not in order.script else load_script(order.script).main
        from opensora.utils.main import run_main

        run_main(main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def end_with_the_server() -> None:
    """Have this process killed when the server is (Linux): nothing runs on after the tests."""
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def prepare(order: Order) -> None:
    """Place, streams, limits and the watch on weights of a forked process."""
    os.chdir(order.folder)
    os.environ["TMPDIR"] = tempfile.tempdir = order.temporary
    streams = order.streams or order.folder
    for name, stream in ((os.devnull, 0), (f"{streams}.out", 1), (f"{streams}.err", 2)):
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, stream)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [order.script, *order.words]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order.stop_at_weights:
        watch_weights()
    os.environ.update(order.environment)
    if order.hub:
        reach_hub(order.hub)
    watch_changes(order, f"{streams}.changes")


def watch_weights() -> None:
    """End this process where it would read the weights of a model."""
    from opensora.models.text import embedder
    from opensora.utils.weights import WeightFiles

    def end(*arguments: Any, **keys: Any) -> Any:
        atexit._run_exitfuncs()
        os._exit(AT_WEIGHTS)

    WeightFiles.tensors = end  # type: ignore[method-assign]
    embedder._load_model = end


def watch_changes(order: Order, count: str) -> None:
    """Count what this process changes in its folders, and have it get its signal before one of these changes."""
    ours, left = os.getpid(), itertools.count(order.moment, -1)
    places = (Path(order.folder), Path(order.temporary))
    os.truncate(handle := os.open(count, os.O_RDWR | os.O_CREAT, 0o644), 0)

    def look(event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES or os.getpid() != ours or (event == "open" and not (given[2] or 0) & WRITING):
            return
        path = given[1] if event == "os.rename" else given[0]  # its new name
        if not isinstance(path, str | bytes | os.PathLike):  # an open file, by its number
            return
        place = Path(os.fsdecode(path)).absolute()
        if not any(place.is_relative_to(folder) for folder in places):
            return
        os.write(handle, b".")
        if next(left) == 0 and order.killed:
            os.kill(ours, order.killed)

    sys.addaudithook(look)


def reach_hub(address: str) -> None:
    """Let an address stand for the Hugging Face hub; its library has read its environment already."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_OFFLINE = address, False
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"


def _call(order: Order) -> Callable[[Any], Any]:
    good, name = order.words
    call = getattr(importlib.import_module("tests.attack.calls"), order.script)(good)[name]
    return lambda argv: call()


def mount(mount: str, options: str = "", flags: int = 0) -> str:
    """Put a file system in memory at a folder, or change its ``options`` and ``flags``; without either, take it away.

    Returns:
        What went wrong, empty if nothing did.
    """
    library = ctypes.CDLL(None, use_errno=True)
    place = os.fsencode(mount)
    failed = (
        library.mount(b"tmpfs", place, b"tmpfs", ctypes.c_ulong(flags), options.encode())
        if options or flags
        else library.umount2(place, DETACH)
    )
    return os.strerror(ctypes.get_errno()) if failed else ""


def own_mounts() -> None:
    """Let what this process mounts be seen by nobody else, and go with it; where the system allows that (Linux)."""
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        if library.unshare(NEW_MOUNTS) == 0:
            library.mount(b"none", b"/", None, ctypes.c_ulong(RECURSIVE | PRIVATE), None)


def serve() -> None:
    """Answer orders until there are no more."""
    own_mounts()
    import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        if "mount" in given:
            print(json.dumps(mount(**given)), flush=True)
            continue
        print(json.dumps([asdict(each) for each in fork(*(Order(**order) for order in given["orders"]))]), flush=True)


if __name__ == "__main__":
    serve()
