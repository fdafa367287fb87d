"""What a run is said to take is what was measured, and the page of cards says what a dry run does."""

import dataclasses

import pytest
import torch

from opensora.config import load_config, parse_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion.cards import CARDS, Card, known_card
from opensora.diffusion.prepared import PreparedRun
from opensora.generation import dry_run
from opensora.generation.estimate import Estimate, Way, gib, seconds_text
from opensora.generation.run import generate
from tools.benchmark import hardware

GIB = 2**30
H100 = next(card for card in CARDS if card.name.startswith("H100"))
OFFLOAD = Way("--offload True", offload=True)


@pytest.fixture(scope="module")
def released():
    """Figures of 256px text to video at the released sizes."""
    return hardware.estimate_of("256px t2v")


def test_an_h100_takes_what_was_measured_there(released):
    outlook = released.outlook(released.own, H100)
    assert outlook.total == pytest.approx(31.5, rel=0.1)
    assert outlook.seconds["decode"] == pytest.approx(1.1, rel=0.2)
    assert outlook.peak / GIB == pytest.approx(47.1, rel=0.02)
    assert (outlook.fits, outlook.tiles) == (True, "")


def test_768px_takes_what_was_measured():
    estimate = hardware.estimate_of("768px t2v")
    assert estimate.outlook(estimate.own, H100).total == pytest.approx(724, rel=0.1)
    assert estimate.decoding.peak / GIB == pytest.approx(21, rel=0.03)


def test_what_stays_off_the_card_is_not_counted(released):
    plain, _ = released.peaks(OFFLOAD, 80 * GIB)
    run = dataclasses.replace(released.run, cfg=dataclasses.replace(released.run.cfg, precompute=False))
    without, _ = Estimate(run, released.plan).peaks(OFFLOAD, 80 * GIB)
    assert without["denoise"] / GIB == pytest.approx(23.17, rel=0.04), "measured"
    assert (without["denoise"] - plain["denoise"]) / GIB == pytest.approx(6.05, rel=0.01)


def test_the_first_way_that_fits_is_proposed(released):
    found = {card.name: released.on(card) for card in CARDS}
    assert found["H100 80GB"].way.flags == ""
    assert found["RTX 4090 24GB"].way.flags == "--offload True"
    small = found["T4 16GB"]
    assert small.fits
    assert small.way.flags.endswith("--dtype fp16")
    assert "--t5.quantize" not in small.way.flags, "T5 fits as it is"
    for outlook in found.values():
        assert not outlook.fits or outlook.peak <= max(card.room for card in CARDS)
    tiny = released.on(Card("toy", 10, 3.0, 100, 16))
    assert not tiny.fits or tiny.way.streams


def test_flags_that_are_proposed_can_be_given(released):
    ways = list(released.ways())
    assert len(ways) >= 2
    for way in ways:
        cfg = parse_config([str(hardware.ROOT / hardware.CONFIG), *way.flags.split()], InferenceOptions)
        assert bool(cfg.offload) == way.offload


def test_blocks_that_come_and_go_need_little_and_cost_what_copying_them_takes(released):
    way = Way("--offload blocks", offload=True, streams=True)
    small, large = Card("small", 100, 6.0, 500, 10), Card("large", 100, 40.0, 500, 10)
    least, there = released.outlook(way, small), released.outlook(way, large)
    assert least.fits
    assert least.peak <= small.room
    assert there.seconds["denoise"] == released.outlook(OFFLOAD, large).seconds["denoise"], "all of it stays"
    full = released.peaks(OFFLOAD, large.room)[0]["denoise"]
    copied = small.copy_seconds(full - small.room) * released.plan.num_steps
    computed = there.seconds["denoise"]
    assert least.seconds["denoise"] == pytest.approx(max(copied, computed), rel=0.05)
    assert not released.outlook(way, Card("tiny", 100, 1.0, 500, 10)).fits


def test_tiles_get_smaller_before_the_way_changes(released):
    """48 GB: as it is, in smaller tiles."""
    outlook = released.on(next(card for card in CARDS if card.name.startswith("L40S")))
    assert outlook.way.flags == ""
    assert "tiles of" in outlook.tiles


def test_a_region_decodes_its_reference_too(released):
    plans = [dataclasses.replace(released.plan, cond_type=each, has_image=True) for each in ("extend_right", "region")]
    other, region = (Estimate(released.run, plan).seconds(released.own, H100, None) for plan in plans)
    assert region["decode"] == pytest.approx(2 * other["decode"])
    assert region["references"] == pytest.approx(2 * other["references"])


def test_a_slower_card_takes_longer(released):
    seconds = [released.outlook(OFFLOAD, card).seconds["denoise"] for card in CARDS]
    rates = [card.tflops for card in CARDS]
    order = sorted(range(len(CARDS)), key=lambda i: -rates[i])
    assert seconds[order[0]] < seconds[order[-1]]
    assert CARDS[seconds.index(max(seconds))].name == "RTX 3060 12GB"


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("Tesla T4", "T4 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA T400", None),
    ],
)
def test_cards_are_known_by_their_drivers_names(name, card):
    found = known_card(name)
    assert (found.name if found else None) == card


def test_a_dry_run_says_it_after_the_plan(tiny_config, tmp_path):
    cfg = load_config({**tiny_config, "prompt": "a", "dry_run": True, "save_dir": str(tmp_path)}, InferenceOptions)
    lines: list[str] = []
    generate(cfg, torch.device("cpu"), log=lines.append)
    before, after = lines[0].split("dry run: nothing loaded, nothing written\n")
    assert before.startswith("video        9 frames of 32 x 32")
    assert "peak         of the GPU, GiB: text" in after
    assert all(card.name in after for card in CARDS)
    assert "fits" not in after, "there is no GPU to compare with"


def test_the_gpu_that_is_there_is_compared(tiny_config, monkeypatch):
    cfg = load_config({**tiny_config, "prompt": "a", "gpu_memory": "1GB"}, InferenceOptions)
    run = dataclasses.replace(PreparedRun.of(cfg, torch.device("cpu")), device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    estimate = Estimate(run, run.plan)
    line = dry_run._fit_line(estimate, dry_run._card_here(run))
    assert line.startswith("fits         NVIDIA GeForce RTX 3090, of which 0.9 GiB may be used")
    none = dataclasses.replace(dry_run._card_here(run), gib=0.5)
    assert dry_run._fit_line(estimate, none).startswith("fits not     NVIDIA GeForce RTX 3090")


def test_the_page_is_up_to_date():
    assert hardware.PAGE.read_text(encoding="utf-8") == hardware.page(), "python tools/benchmark/hardware.py writes it"


def test_figures_for_people():
    assert [seconds_text(s) for s in (0.04, 0.94, 31.53, 724.4, 5400)] == [
        "0.04 s",
        "0.9 s",
        "31.5 s",
        "724 s",
        "90 min",
    ]
    assert [gib(GIB * x) for x in (0.001, 1.04, 23.17)] == ["0.001", "1.0", "23.2"]
