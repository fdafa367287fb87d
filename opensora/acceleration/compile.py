"""Compiled transformer blocks: ``torch.compile`` for the forward of each block, hooks and everything around it outside.

All blocks of one class share their compiled code: blocks that differ in weights only have one graph between them, so a
model of 57 blocks compiles two. Outside stay what belongs around a block: gradient checkpointing, FSDP's gathering of
weights, copies of weights that are streamed, step caches. Exchanges between ranks interrupt a graph.

The text encoders (one forward per sample) and the autoencoder (tiles at the edges have sizes of their own, and its time
goes into convolutions) are left as they are: together they take a second or two of a video, and compiling takes longer.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from opensora.acceleration.sequence_parallel import RingAttention, UlyssesAttention
from opensora.models.diffusion import DiffusionModel
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

GRAPHS = 64  # of one class of blocks, for sizes, batches and adapters that differ, before torch gives up compiling it


def check_compiler(device: torch.device) -> None:
    """See that what makes kernels is there.

    Raises:
        UserError: says what to install.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("compile: kernels for the GPU need Triton, which does not run here; `pip install triton`")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("compile: kernels for the CPU need a C++ compiler; install g++ (apt install g++)") from None


def kernel_folder() -> str:
    """Where inductor keeps its kernels from one run to the next."""
    from torch._inductor import codecache

    folder: str = codecache.cache_dir()  # type: ignore[attr-defined]
    return folder


def compile_blocks(model: DiffusionModel, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the blocks of a model when they first run, in place; parameters, keys and hooks stay.

    Comes after LoRA, quantisation and the division over ranks, which replace modules inside of blocks, and before an
    engine, which wraps them.

    Args:
        model: its blocks are :meth:`DiffusionModel.blocks_in_order`.
        backend: of ``torch.compile``.

    Returns:
        Number of classes of blocks, 0 for a model that names no blocks.
    """
    compiled: dict[Any, Callable[..., Any]] = {}
    apart: dict[Any, Callable[..., Any]] = {}
    for block in model.blocks_in_order():
        _share(block, "forward", compiled, lambda plain: torch.compile(plain, backend=backend, **_limit()))
        for module in block.modules():
            if isinstance(module, RingAttention | UlyssesAttention):  # exchanges have an order and streams of their own
                _share(module, "attend", apart, torch.compiler.disable)
    return len(compiled)


def compile_and_tell(model: nn.Module, name: str) -> None:
    """:func:`compile_blocks`, and say beforehand what it takes.

    Args:
        model: to compile.
        name: its section of the config.
    """
    kinds = compile_blocks(model) if isinstance(model, DiffusionModel) else 0
    if not kinds:
        logger.info("compile: %s names no blocks (blocks_in_order), it is not compiled", name)
        return
    logger.info(
        "compile: the first step of %s, and of each new size of videos, takes longer: half a minute on an H100, a few "
        "minutes on a slow machine; kernels are kept in %s, which makes later runs start faster",
        name, kernel_folder(),
    )  # fmt: skip


def _share(
    module: nn.Module, name: str, made: dict[Any, Callable[..., Any]], make: Callable[[Any], Callable[..., Any]]
) -> None:
    """Replace a method of a module by what ``make`` makes of it, once for all modules of its class: graphs are told
    apart by functions."""
    plain = getattr(type(module), name)
    if plain not in made:
        made[plain] = make(plain)
    setattr(module, name, MethodType(made[plain], module))


def _limit() -> dict[str, Any]:
    """Argument that raises the number of graphs, where this torch has it (since 2.12)."""
    return {"recompile_limit": GRAPHS} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
