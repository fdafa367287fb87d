"""What a machine has for the package, found out without a network and without needing anything but Python."""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opensora.utils.errors import first_line
from opensora.utils.paths import PACKAGE, in_checkout, shipped_root

NAME = "opensora"
GIB = 2**30
LITTLE_DISK, LITTLE_SHARED = 5.0, 1.0  # GiB
State = Literal["ok", "note", "missing"]


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: what was looked at.
        text: what was found.
        state: ``missing`` is something that the package cannot do without; ``note`` something that it can.
        fix: command, or what else there is to do.
    """

    name: str
    text: str
    state: State = "ok"
    fix: str = ""


class Optional(NamedTuple):
    """A package that is of use and not needed.

    Attributes:
        module: to look for.
        name: its name, and of its distribution.
        use: what for.
        fix: what installs it.
        load: import it, since a kernel that is there may not fit the torch that is there.
    """

    module: str
    name: str
    use: str
    fix: str
    load: bool = False


OPTIONAL = (
    Optional(
        "flash_attn_interface",
        "flash-attn-3",
        "model.attn_backend flash3 (H100, H200)",
        "build the folder hopper of github.com/Dao-AILab/flash-attention",
        load=True,
    ),
    Optional(
        "flash_attn",
        "flash-attn",
        "model.attn_backend flash2",
        "pip install flash-attn --no-build-isolation   (needs nvcc)",
        load=True,
    ),
    Optional("sageattention", "sageattention", "model.attn_backend sage", "pip install sageattention", load=True),
    Optional("xformers", "xformers", "model.attn_backend xformers", "pip install xformers", load=True),
    Optional("triton", "triton", "compile True on a GPU", "pip install triton"),
    Optional(
        "liger_kernel", "liger-kernel", "model.norm_backend, rope_backend liger", "pip install liger-kernel", load=True
    ),
    Optional("bitsandbytes", "bitsandbytes", "quantize nf4, optim.cls AdamW8bit", "pip install bitsandbytes"),
    Optional(
        "colossalai",
        "colossalai",
        "training plugins zero1, zero2, hybrid, torch_ddp",
        "pip install -r requirements-colossalai.txt && pip install --no-deps colossalai==0.5.0",
    ),
    Optional("fastapi", "fastapi", "opensora serve", 'pip install "opensora[serve]"'),
    Optional("gradio", "gradio", "the page of opensora serve", 'pip install "opensora[serve]"'),
    Optional("openai", "openai", "refine_prompt, motion_score dynamic", "pip install openai"),
    Optional("wandb", "wandb", "trackers wandb, wandb True", "pip install wandb"),
    Optional("swanlab", "swanlab", "trackers swanlab", "pip install swanlab"),
    Optional("ray", "ray", "tools/data on several machines", 'pip install "ray[data]"'),
)


def package() -> Iterator[Finding]:
    """Python, the package, and where its configs are."""
    yield Finding("python", f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")
    root = shipped_root()
    kind = "checkout" if in_checkout() else "installed"
    yield Finding(NAME, f"{version_of(NAME) or 'not installed'}, {kind}: {PACKAGE}")
    absent = [name for name in ("configs", "assets") if not (root / name).is_dir()]
    if absent:
        fix = "pip install . in a checkout, or a wheel"
        yield Finding("configs, assets", f"no {' and no '.join(absent)} in {root}", "missing", fix)
    else:
        yield Finding("configs, assets", str(root))


def requirements() -> Iterator[Finding]:
    """Packages that the package needs, in the versions that it wants."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in metadata.requires(NAME) or ()]
    except (ImportError, metadata.PackageNotFoundError):
        yield Finding("packages", "unknown: opensora is not installed", "note", "pip install .")
        return
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    good = 0
    for each in needed:
        version = version_of(each.name)
        if version is not None and each.specifier.contains(version, prereleases=True):
            good += 1
            continue
        text = "not there" if version is None else f"{version}, needs {each.specifier}"
        yield Finding(each.name, text, "missing", f'pip install "{each.name}{each.specifier}"')
    yield Finding("packages", f"{good} of {len(needed)} that are needed are there")


def torch_and_cards() -> Iterator[Finding]:
    """PyTorch, CUDA, cuDNN and the cards."""
    try:
        import torch
    except Exception as error:  # a broken binary raises OSError as often as ImportError
        why = "not there" if isinstance(error, ModuleNotFoundError) else f"cannot be imported: {first_line(error)}"
        yield Finding("torch", why, "missing", "pip install torch   (pytorch.org/get-started for other CUDAs)")
        return
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.version.cuda is None and torch.version.hip is None:
        yield Finding("CUDA", "this torch is built for CPUs only", "note", "pytorch.org/get-started for a GPU")
        return
    built = torch.version.cuda or f"ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        fix = "a driver (nvidia-smi), and in a container --gpus all"
        yield Finding("CUDA", f"torch is built for {built}, and no GPU can be used", "note", fix)
        return
    yield Finding("CUDA", f"{built}, {torch.cuda.device_count()} GPU")
    yield Finding("cuDNN", str(torch.backends.cudnn.version() or "not there"))
    for index in range(torch.cuda.device_count()):
        yield _card(torch, index)


def _card(torch: Any, index: int) -> Finding:
    try:
        facts = torch.cuda.get_device_properties(index)
        free, whole = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Finding(f"GPU {index}", f"cannot be used: {first_line(error)}", "note", "nvidia-smi says more")
    half = "bf16" if facts.major >= 8 else "no bf16: give --dtype fp16 or fp32"
    memory = f"{whole / GIB:.1f} GiB, {free / GIB:.1f} free"
    return Finding(f"GPU {index}", f"{facts.name}, {memory}, compute capability {facts.major}.{facts.minor}, {half}")


def room(folder: Path) -> Iterator[Finding]:
    """Processors, memory, disk and shared memory."""
    yield Finding(
        "processors", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    try:
        import psutil

        memory = psutil.virtual_memory()
        yield Finding("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} available")
    except ImportError:
        yield Finding("memory", "unknown", "note", "pip install psutil")
    free = shutil.disk_usage(folder).free / GIB
    state: State = "ok" if free >= LITTLE_DISK else "note"
    yield Finding(
        "disk", f"{free:.1f} GiB free at {folder}", state, "" if state == "ok" else "weights take up to 45 GiB"
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        state = "ok" if free >= LITTLE_SHARED else "note"
        fix = "in a container --shm-size 8g; or --num_workers 0"
        yield Finding("shared memory", f"{free:.1f} GiB free (readers of clips)", state, "" if state == "ok" else fix)


def video() -> Iterator[Finding]:
    """What writes and reads videos."""
    try:
        import av

        encoders = [name for name in ("libx264", "h264", "libopenh264") if _has_encoder(av, name)]
    except Exception as error:
        yield Finding("av", f"cannot be imported: {first_line(error)}", "missing", 'pip install "av>=18,<19"')
        return
    ffmpeg = ".".join(map(str, av.ffmpeg_version_info.split(".")))
    if encoders:
        yield Finding("av", f"{av.__version__}, FFmpeg {ffmpeg} inside, writes h264 by {encoders[0]}")
    else:
        yield Finding("av", f"{av.__version__} cannot write h264", "missing", "pip install --force-reinstall av")
    program = shutil.which("ffmpeg")
    yield Finding("ffmpeg", program or "no program of this name; none is needed")


def _has_encoder(av: Any, name: str) -> bool:
    try:
        av.Codec(name, "w")
    except Exception:  # av has an exception class of its own for it, by version
        return False
    return True


def optional_packages(torch_is_there: bool) -> Iterator[Finding]:
    """What is of use and not needed, with what installs it."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    use = "compile True on a CPU, kernels that are built here"
    yield Finding(
        "C++ compiler", f"{compiler or 'not there'}: {use}", *(() if compiler else ("note", "apt install g++"))
    )
    for each in OPTIONAL:
        if importlib.util.find_spec(each.module) is None:
            yield Finding(each.name, f"not there: {each.use}", "note", each.fix)
            continue
        version = version_of(each.name) or "there"
        why = _not_importable(each.module) if each.load and torch_is_there else None
        if why is None:
            yield Finding(each.name, f"{version}: {each.use}")
        else:
            yield Finding(each.name, f"{version}, but cannot be imported ({why}): {each.use}", "note", each.fix)


def _not_importable(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a kernel for another torch raises anything
        return first_line(error) if isinstance(error, Exception) else "it ended Python"
    return None


def version_of(name: str) -> str | None:
    """Version of an installed distribution, None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
