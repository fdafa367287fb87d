"""A process that has imported everything, and forks one per command line: each costs milliseconds, not seconds.

It reads one JSON object per line (:class:`Order`) and answers with one (:class:`Outcome`).
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
AT_WEIGHTS = 99  # exit status of a process that came to read the weights of a model
KILLED = 137
GIB = 2**30
ADDRESSES = 24 * GIB  # of one process
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
    """

    script: str
    words: list[str]
    folder: str
    temporary: str
    seconds: float
    stop_at_weights: bool = True


@dataclass
class Outcome:
    """How it ended: exit status, seconds, and what it added to the server's memory at most, in bytes."""

    status: int
    seconds: float
    memory: int


def load_script(place: str) -> ModuleType:
    """A script as a module."""
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
    gc.collect()
    gc.freeze()  # children that look for garbage do not copy all of it


def fork(order: Order) -> Outcome:
    """Run an order in a process of its own."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pid = os.fork()
    if pid == 0:
        run(order)
    handle = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    in_time = bool(waiting.poll(order.seconds * 1000))
    with contextlib.suppress(ProcessLookupError):  # what it has started goes as well
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(handle)
    code = os.waitstatus_to_exitcode(status) if in_time else KILLED
    return Outcome(code if code >= 0 else 128 - code, time.monotonic() - started, (usage.ru_maxrss - before) * 1024)


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
    for name, stream in ((os.devnull, 0), (f"{order.folder}.out", 1), (f"{order.folder}.err", 2)):
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


def watch_weights() -> None:
    """End this process where it would read the weights of a model."""
    from opensora.models.text import embedder
    from opensora.utils.weights import WeightFiles

    def end(*arguments: Any, **keys: Any) -> Any:
        atexit._run_exitfuncs()
        os._exit(AT_WEIGHTS)

    WeightFiles.tensors = end  # type: ignore[method-assign]
    embedder._load_model = end


def _call(order: Order) -> Callable[[Any], Any]:
    good, name = order.words
    call = getattr(importlib.import_module("tests.attack.calls"), order.script)(good)[name]
    return lambda argv: call()


def serve() -> None:
    """Answer orders until there are no more."""
    import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(fork(Order(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    serve()
