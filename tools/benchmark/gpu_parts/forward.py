"""One forward of the transformer, by variant, beside diffusers' Flux and Open-Sora's own model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tools.benchmark.cases import diffusers_module, flux_call, flux_config
from tools.benchmark.gpu_parts.bench import Bench, Row, filled
from tools.benchmark.gpu_parts.variants import Variant, variants
from tools.benchmark.released import TERA, released_inputs, released_model

ORIGINAL = Path(__file__).with_name("original.py")


def forward_rows(bench: Bench) -> Iterator[Row]:
    """Rows of all variants, the quick ones first, then those of other programs."""
    first: torch.Tensor | None = None
    there, missing = _there()
    yield from missing
    for resolution in bench.resolutions:
        for variant in there:
            needed = variant.seconds if resolution == "256px" else 35
            if resolution not in variant.resolutions:
                continue
            if not bench.has_time(f"forward {resolution}, {variant.name}", needed):
                continue
            row, out = _forward(bench, variant, resolution)
            if resolution == "256px" and out is not None:
                if first is None:
                    first = out
                else:
                    row["difference"] = float((out - first).norm() / first.norm())
            yield row
            bench.clear()
    if bench.has_time("forward, diffusers", 15):
        yield {
            "forward": "diffusers' FluxTransformer2DModel",
            "size": "256px",
            **_with_rate(bench, "256px", _flux(bench)),
        }
        bench.clear()
    if bench.original is not None and bench.has_time("forward, original", 40):
        yield {"forward": "Open-Sora's own", "size": "256px", **_with_rate(bench, "256px", original(bench))}


def _there() -> tuple[list[Variant], list[Row]]:
    """Variants that can be, and rows of those that are not installed or not for this card."""
    there: list[Variant] = []
    missing: list[Row] = []
    for variant in variants():
        try:
            variant.check()
        except Exception as error:
            missing.append({"forward": variant.name, "size": "", "note": f"left out: {_first_line(error)}"})
        else:
            there.append(variant)
    return there, missing


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]


def _forward(bench: Bench, variant: Variant, resolution: str) -> tuple[Row, torch.Tensor | None]:
    sizes = bench.sizes(resolution)
    torch.manual_seed(0)
    model = released_model(sizes, bench.device).eval().requires_grad_(False)
    inputs = released_inputs(model, sizes, bench.device)
    row: Row = {"forward": variant.name, "size": resolution}
    out: torch.Tensor | None = None

    @torch.no_grad()
    def run() -> None:
        nonlocal out
        out = model(**inputs)

    try:
        variant.change(model, bench)
    except Exception as error:  # not installed, or not on this card
        return {**row, "note": f"left out: {_first_line(error)}"}, None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    row |= _with_rate(bench, resolution, bench.measure(run, 3 if resolution == "256px" else 1)) | {
        "weights_gib": weights / 2**30
    }
    return row, None if out is None else out.float().cpu()


def _with_rate(bench: Bench, resolution: str, row: Row) -> Row:
    if "median_s" in row:
        row["tflops"] = bench.forward_flops(resolution) / row["median_s"] / TERA
    return row


def _flux(bench: Bench) -> Row:
    """diffusers' model of the same sizes on the same tokens (it has no input for references)."""
    sizes = bench.sizes("256px")
    try:
        kind = diffusers_module().FluxTransformer2DModel
    except Exception as error:
        return {"note": f"left out: {error}"}
    model = filled(lambda: kind(**flux_config(sizes)), bench.device, sizes.dtype)
    call = flux_call(model, sizes, bench.device)
    return bench.measure(torch.no_grad()(call))


def original(bench: Bench) -> Row:
    """Open-Sora's own model, from its checkout, in a process of its own (its package has the name of ours)."""
    sizes = bench.sizes("256px")
    given = {
        "device": bench.device.type,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "hidden": sizes.hidden,
        "depth": sizes.depth,
        "depth_single": sizes.depth_single,
        "text": sizes.text,
        "latent": sizes.latent,
    }
    command = [sys.executable, str(ORIGINAL), json.dumps(given)]
    environment = os.environ | {"PYTHONPATH": str(bench.original)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(bench.left, 60))
    except subprocess.TimeoutExpired:
        return {"note": "left out: no answer in time"}
    if done.returncode:
        return {
            "note": f"left out: {done.stderr.strip().splitlines()[-1][:80] if done.stderr.strip() else 'no reason'}"
        }
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found
