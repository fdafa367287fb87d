"""The measurement of a GPU, part by part at toy size on the CPU, and the pages that it writes."""

import time
from pathlib import Path

import pytest
import torch

from opensora.config.choices import ATTENTION_KERNELS, QUANTIZERS
from opensora.generation.estimate import Way
from opensora.models.quantization.linear import QuantizedLinear
from opensora.utils.errors import UserError
from tools.benchmark import gpu
from tools.benchmark.gpu_parts import autoencoder, forward, pipelines
from tools.benchmark.gpu_parts.autoencoder import decode_rows, group_norm_rows
from tools.benchmark.gpu_parts.bench import Bench, room_of
from tools.benchmark.gpu_parts.training import training_rows
from tools.benchmark.gpu_parts.variants import variants
from tools.benchmark.hardware import ROOT

CPU = torch.device("cpu")
ROW = {"pipeline": "256px t2v, --step-cache 0.1", "peak_gib": 30.04, "total_s": 13.96, "text_s": 0.5}
STAGES = {"denoise_s": 12.4, "decode_s": 1.06}
H100 = {"date": "2026-12-01", "device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "cudnn": 91900}


@pytest.fixture
def bench():
    return Bench(CPU, toy=True, quick=True)


def test_every_kernel_and_kind_that_is_registered_is_measured():
    names = [variant.name for variant in variants()]
    assert names[0] == "eager"
    for kernel in set(ATTENTION_KERNELS) - {"sdpa", "math"}:
        assert f"attention {kernel}" in names
    for kind in QUANTIZERS:
        assert f"weights {kind}" in names


def test_forwards_beside_each_other(bench, monkeypatch):
    """Without those that need much to be imported; Open-Sora's own is ours here."""
    wanted = [v for v in variants() if v.name in ("eager", "weights int8", "attention flash3")]
    monkeypatch.setattr(forward, "variants", lambda: iter(wanted))
    monkeypatch.setattr(forward, "_flux", lambda bench: {"note": "left out here"})
    bench.original = ROOT
    rows = {row["forward"]: row for row in forward.forward_rows(bench)}
    assert rows["eager"]["median_s"] > 0
    assert rows["eager"]["tflops"] > 0
    assert 0 < rows["weights int8"]["difference"] < 0.1
    assert rows["weights int8"]["weights_gib"] < rows["eager"]["weights_gib"]
    assert "needs the module" in rows["attention flash3"]["note"]
    assert rows["Open-Sora's own"]["median_s"] > 0


def test_autoencoder_and_training(bench, monkeypatch):
    for name in list(autoencoder.TILINGS)[2:]:
        monkeypatch.delitem(autoencoder.TILINGS, name)
    rows = list(decode_rows(bench))
    assert [row["decode"] for row in rows] == [*autoencoder.TILINGS, "encoding, spatial tiles"]
    assert all(row["median_s"] > 0 and row["counted_gib"] > 0 for row in rows)
    assert {row["group norm"] for row in group_norm_rows(bench) if row["gb_per_s"] > 0} >= {"copy", "ours"}
    monkeypatch.setattr("tools.benchmark.gpu_parts.training.compiled", lambda model, bench: None)
    monkeypatch.setattr("tools.benchmark.gpu_parts.training.lora", lambda bench: {"median_s": 1.0})  # imports much
    assert [row["median_s"] > 0 for row in training_rows(bench)] == [True] * 4


def test_pipelines_whole_and_held_to_less(bench):
    bench.caps = (12, 24)
    models = pipelines.Models(bench)
    (plain,) = pipelines.pipeline_rows(bench, models)
    assert plain["pipeline"] == "256px t2v"
    assert plain["steps"] == 2
    assert plain["total_s"] >= plain["denoise_s"] > 0
    assert [row["held to"] for row in pipelines.capped_rows(bench, models)] == ["24 GB", "12 GB"]
    assert room_of(16) == 15.5
    before = models.models
    for way in (Way(quantize="int8", t5_quantize="int8"), Way(quantize="int8", t5_quantize="int8")):
        models.quantize(way)
        assert models.models is before
    for name in ("model", "t5"):
        assert any(isinstance(module, QuantizedLinear) for module in before[name].modules())
    models.quantize(Way(quantize="nf4"))
    assert models.models is not before, "of another kind"
    blocks = models.models["model"].blocks_in_order()
    models.pipeline(models.config(compile=True))
    assert "forward" in vars(blocks[0]), "compiled when it first runs"
    models.pipeline(models.config())
    assert "forward" not in vars(models.models["model"].blocks_in_order()[0])


def test_what_there_is_no_time_for_is_named(monkeypatch):
    bench = Bench(CPU, seconds=100, started=time.perf_counter() - 98)
    assert not bench.has_time("forward, eager", 10)
    assert bench.left_out == ["forward, eager: 2 s left, about 10 s needed"]


def test_parts_one_after_the_other(monkeypatch):
    """One that fails leaves what it has measured, and the next one goes on; each keeps time for those after it."""
    bench = Bench(CPU, seconds=100)
    shown: list[str] = []
    kept: list[str] = []

    def fails():
        yield {"card": "x"}
        raise RuntimeError("the card is gone\nat line 7")

    def forwards():
        assert not bench.has_time("forward, eager", 95)
        yield {"forward": "eager"}

    monkeypatch.setattr(gpu, "parts", lambda bench: {"card": fails, "forward": forwards, "training": lambda: []})
    found = gpu.measure(bench, shown.append, ["training", "forward", "card"], lambda tables: kept.append([*tables][-1]))
    assert found == {"Card": [{"card": "x"}], "One forward": [{"forward": "eager"}], "Training steps": []}
    assert kept == [*found]
    assert "| x |" in shown[0]
    assert shown[-2] == "left out: Card, after 1 rows: RuntimeError: the card is gone"
    assert "forward, eager: 8" in shown[-1], "16 s of 100 are kept for training"
    assert "s left, about 95 s needed" in shown[-1]


def test_which_parts(bench):
    assert [*gpu.parts(bench)] == [*gpu.PARTS]
    assert {*gpu.PARTS} - {*gpu.chosen(bench, [])} == {"capped", "training"}, "quick, and no --cap"
    assert gpu.chosen(bench, ["training", "card"]) == ["card", "training"]


def test_the_card(bench):
    """A copy onto itself would be none at all."""
    rows = {row["card"]: row for row in gpu.card_rows(bench)}
    assert 0 < rows["copy on the card"]["gb_per_s"] < 2e4


def test_what_fails_is_a_row(bench):
    def fail():
        raise NotImplementedError("no kernel for this card\nmore")

    assert bench.measure(fail) == {"note": "NotImplementedError: no kernel for this card"}


def test_pages(tmp_path, monkeypatch):
    page, measured, hardware = tmp_path / "b.md", tmp_path / "measured.json", tmp_path / "h.md"
    page.write_text("# Benchmarks\n\nbefore\n")
    measured.write_text("[]")
    monkeypatch.setattr(gpu, "PAGE", page)
    monkeypatch.setattr(gpu.hardware, "MEASURED", measured)
    monkeypatch.setattr(gpu.hardware, "PAGE", hardware)
    monkeypatch.setattr(gpu.hardware, "page", lambda: "the page")
    row = {**ROW, **STAGES}
    for total in (13.96, 12.0):
        gpu.write_pages(H100, {"Pipelines": [{**row, "total_s": total}], "Card": []}, ["training: no time"])
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\nbefore\n")
    assert text.count("## One GPU") == 1, "in the place of the earlier one"
    assert "Left out: training: no time." in text
    assert "NVIDIA H100" in text
    (kept,) = gpu.hardware.measured()
    assert (kept["card"], kept["case"], kept["flags"]) == ("H100 80GB", "256px t2v", "--step-cache 0.1")
    assert (kept["seconds"], kept["peak_gib"]) == (12.0, 30.0)
    assert hardware.read_text() == "the page"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "add --toy"),
        (["--device", "cpu", "--toy", "--write"], "toys are not for the pages"),
        (["--device", "cpu", "--toy", "--cap", "0"], "must be above 0"),
        (["--device", "cpu", "--toy", "--original", "nowhere"], "no checkout of Open-Sora"),
    ],
)
def test_bad_flags(words, message):
    with pytest.raises(UserError, match=message):
        gpu.main(words)


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu --toy runs everything"):
        gpu.main([])
    assert Path(gpu.PAGE).is_file()
