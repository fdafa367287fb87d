"""Forward, backward and update of a part of the transformer: recomputed, not recomputed, compiled; and LoRA."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tools.benchmark.gpu_parts.bench import Bench, Row, cut
from tools.benchmark.gpu_parts.variants import compiled
from tools.benchmark.released import TERA, forward_flops, released_inputs, released_model

RANK = 16


def training_rows(bench: Bench) -> Iterator[Row]:
    """Steps of 4 + 8 blocks of the 11B model (all of a toy), plain SGD without state so that the model is measured."""
    sizes = cut(bench.sizes("256px"), 4, 8)
    for name, recompute, compile_blocks in (
        ("all recomputed", True, False),
        ("nothing recomputed", False, False),
        ("nothing recomputed, blocks compiled", False, True),
    ):
        if not bench.has_time(f"training, {name}", 45 if compile_blocks else 8):
            continue
        model = released_model(sizes, bench.device).train()
        model.set_grad_checkpoint(recompute)
        if compile_blocks:
            compiled(model, bench)
        row = bench.measure(partial(step, model, released_inputs(model, sizes, bench.device)))
        if "median_s" in row:
            row["tflops"] = 3 * forward_flops(sizes) / row["median_s"] / TERA
        blocks = f"{sizes.depth} + {sizes.depth_single} blocks"
        yield {"training": f"{blocks}, {name}", **row}
        del model
        bench.clear()
    if bench.has_time("training, LoRA", 25):
        yield {"training": f"LoRA of rank {RANK} on all blocks, all recomputed", **lora(bench)}
        bench.clear()


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """One step: the mean square of the output, and a small move against its gradient."""
    model(**inputs).float().square().mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight.sub_(weight.grad, alpha=1e-6)
    model.zero_grad(set_to_none=True)


def lora(bench: Bench) -> Row:
    """Adapters on attention and MLP of the whole model."""
    try:
        import peft
    except ImportError as error:
        return {"note": f"left out: {error}"}
    sizes = bench.sizes("256px")
    model: Any = released_model(sizes, bench.device).train()
    inputs = released_inputs(model, sizes, bench.device)
    model.set_grad_checkpoint(True)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name]
    wanted = [name for name in names if "mod" not in name]
    settings = peft.LoraConfig(r=RANK, target_modules=wanted)
    return bench.measure(partial(step, peft.inject_adapter_in_model(settings, model), inputs))
