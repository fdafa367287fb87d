"""The page docs/hardware.md: which card makes what, by which command, in what memory and time.

    python tools/benchmark/hardware.py [--check]

Memory and seconds are those of ``--dry-run`` (`opensora.generation.estimate`), beside what was measured
(``tools/benchmark/measured.json``, to which ``tools/benchmark/gpu.py --write`` adds).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import load_config, run_main
from opensora.config.commands import InferenceOptions
from opensora.diffusion.cards import CARDS
from opensora.diffusion.prepared import PreparedRun
from opensora.generation.estimate import Estimate, gib, seconds_text
from opensora.utils.errors import UserError
from opensora.utils.files import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE, MEASURED = ROOT / "docs" / "hardware.md", Path(__file__).with_name("measured.json")
CONFIG = "configs/diffusion/inference/256px.py"
CASES: Mapping[str, Mapping[str, Any]] = {
    "256px t2v": {},
    "256px i2v": {"cond_type": "i2v_head"},
    "768px t2v": {"resolution": "768px"},
    "768px i2v": {"resolution": "768px", "cond_type": "i2v_head"},
}
INTRODUCTION = """# What a card makes

Videos of 129 frames, 16:9, in 50 steps, by the 11B model with everything that belongs to it: T5, CLIP, autoencoder.
`--dry-run True` gives the same for any other command, beside the card that is there.

Rows called *stated* are computed from the sizes of the models, the makers' rates (dense, 16 bits) and the shares of
them that one H100 reached; memory is the most that is held at a time. They assume no speed-up from quantised weights.
The command is that of the heading with what the last column adds: nothing where all fits as it is, otherwise the first
way that fits, those with the same results first (quantised weights are approximate, and smaller tiles change pixels a
little).

This page is written by `python tools/benchmark/hardware.py`; a test keeps it up to date.
"""


def estimate_of(case: str) -> Estimate:
    """Figures of one of the cases; no weights are needed."""
    cfg = load_config(ROOT / CONFIG, InferenceOptions, {"device": "cpu", "prompt": "a", **CASES[case]})
    # as if no file were there: widths tell the released encoders
    sections = {name: {"from_pretrained": None} for name in ("t5", "clip")}
    cfg = load_config(
        cfg, InferenceOptions, {f"{name}.{key}": v for name, s in sections.items() for key, v in s.items()}
    )
    run = PreparedRun.of(cfg, torch.device("cpu"))
    return Estimate(run, run.plan)


def measured() -> list[dict[str, Any]]:
    """What was measured."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return rows


def rows_of(case: str) -> Iterator[list[str]]:
    """Rows of a case's table."""
    estimate = estimate_of(case)
    for card in CARDS:
        outlook = estimate.on(card)
        if not outlook.fits:
            yield [card.name, "stated", f"{gib(outlook.peak)} GiB", "", "", "does not fit"]
        else:
            tiles = f" (decodes in {outlook.tiles})" if outlook.tiles else ""
            denoise, total = seconds_text(outlook.seconds["denoise"]), seconds_text(outlook.total)
            flags = f"`{outlook.way.flags}`" if outlook.way.flags else ""
            yield [card.name, "stated", f"{gib(outlook.peak)} GiB", denoise, total, (flags + tiles).strip()]
        for row in measured():
            if (row["card"], row["case"]) == (card.name, case):
                peak = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] is not None else ""
                flags = f"`{row['flags']}` " if row["flags"] else ""
                how = f"{flags}({row['of']}; {row['software']}, {row['date']})"
                yield [card.name, "measured", peak, "", seconds_text(row["seconds"]), how]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for case, keys in CASES.items():
        words = "".join(f" --{key.replace('_', '-')} {value}" for key, value in keys.items())
        picture = " --ref picture.png" if "cond_type" in keys else ""
        parts.append(f"## {case}\n\n    python scripts/diffusion/inference.py {CONFIG}{words}{picture} --prompt TEXT\n")
        rows = [["card", "", "memory", "denoise", "video", "with"], ["---"] * 6, *rows_of(case)]
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Write the page, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another")
    args = parser.parse_args(argv)
    if not args.check:
        print(f"wrote {write_text(page(), PAGE)}")
    elif page() != PAGE.read_text(encoding="utf-8"):
        raise UserError(f"{PAGE} is out of date: python tools/benchmark/hardware.py writes it")


if __name__ == "__main__":
    run_main(main)
