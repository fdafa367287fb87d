"""Measure what a video model makes of what it is given: frames at their places (the first and the last picture of a
clip of the demo world), other pictures and clips, a part of the picture in all frames.

It is given pieces of drawn clips, and must make the rest as their captions say, judged as text to video is. Between two
pictures the object must go evenly from one place to the other. Given pictures, and what is kept of a region, are
compared with the autoencoder's own round trip of them. Keys of the config can be overridden as in the inference script.
A run that was ended resumes where it was.
"""

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.diffusion.free import Region, kept_cells
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.references import Placed, Source
from opensora.models.autoencoder import LatentSpec
from tools.demo.analyse import MAX_STRAY, mostly, psnr
from tools.demo.captions import plain_caption
from tools.demo.evaluate_vae import round_trip
from tools.demo.measured import Frames, add_common, measuring
from tools.demo.options import check_counts, config_parser
from tools.demo.paths import track
from tools.demo.scoring import ATTRIBUTES, format_table, judge, share
from tools.demo.world import BACKGROUNDS, NUM_FRAMES, SIZE, Combination, combinations, draw_clip, sample_scene

PAIRS = "frames"
LONG = 33  # frames that v2v_head is given
LEAST_DB = 30.0  # of what is given, against its round trip
SHEET_FRAMES = 5


@dataclass(frozen=True)
class Case:
    """One video to generate.

    Attributes:
        name: of its file.
        cond_type: what its references fix.
        combination, background: what it shows.
        clip: drawn, what the references are taken from [T, 64, 64, 3].
        seed: of the noise.
        kept: of a region, which pixels are kept [64, 64].
    """

    name: str
    cond_type: str
    combination: Combination
    background: str
    clip: Frames
    seed: int
    kept: Tensor | None = None

    @property
    def prompt(self) -> str:
        """The plain wording, with the background."""
        return plain_caption(self.combination, self.background)

    @property
    def references(self) -> list[Source]:
        """What the pipeline is given."""
        return REFERENCES[self.cond_type](self)

    @cached_property
    def given(self) -> list[tuple[int, Frames]]:
        """Pictures and the numbers of the frames that they are."""
        places = {PAIRS: (0, -1), "i2v_head": (0,), "i2v_tail": (-1,), "i2v_loop": (0, -1)}.get(self.cond_type, ())
        return [(place, self.clip[place]) for place in places]

    def judged(self, frames: Frames) -> Frames:
        """What is judged: after a long given clip, what follows it."""
        return frames[LONG - 1 :] if self.cond_type == "v2v_head" else frames


def _mask(case: Case) -> Frames:
    assert case.kept is not None
    return np.repeat(255 * case.kept.numpy().astype(np.uint8)[..., None], 3, axis=2)


REFERENCES: Mapping[str, Callable[[Case], list[Source]]] = {
    PAIRS: lambda case: [Placed(case.clip[0], 0), Placed(case.clip[-1], -1)],
    "region": lambda case: [case.clip, _mask(case)],
    "extend_right": lambda case: [case.clip[: NUM_FRAMES // 2 + 1]],
    "extend_left": lambda case: [case.clip[NUM_FRAMES // 2 :]],
    "i2v_head": lambda case: [case.clip[0]],
    "i2v_tail": lambda case: [case.clip[-1]],
    "i2v_loop": lambda case: [case.clip[0], case.clip[-1]],
    "v2v_head": lambda case: [case.clip[:LONG]],
}


def plan_cases(pairs: int, num: int, cond_types: Sequence[str], seed: int, spec: LatentSpec) -> list[Case]:
    """``pairs`` cases of two pictures and ``num`` of every other condition: trained combinations and those held out
    alike, after a long clip those that go on; backgrounds in turn."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    for cond_type in cond_types:
        every = combinations("long" if cond_type == "v2v_head" else "all")
        order = rng.permutation(len(every))
        length = 3 * (NUM_FRAMES - 1) + 1 if cond_type == "v2v_head" else NUM_FRAMES
        for i in range(pairs if cond_type == PAIRS else num):
            combination, background = every[order[i % len(order)]], list(BACKGROUNDS)[i % 2]
            clip = draw_clip(sample_scene(rng, combination, background), length)
            case = Case(f"{cond_type}_{i:03d}", cond_type, combination, background, clip, seed + len(cases))
            cases.append(replace(case, kept=_region(case.seed, spec)) if cond_type == "region" else case)
    return cases


def _region(seed: int, spec: LatentSpec) -> Tensor:
    """Kept pixels [64, 64] of a rectangle as in training, of which some latents are kept whole, and some are not."""
    latents = spec.latent_size(NUM_FRAMES, SIZE, SIZE)[0]
    region, rng = Region(), random.Random(seed)
    layout = region.layouts(latents, spec.is_causal)[0]
    while True:
        drawn = region.draw(layout, latents, spec.is_causal, rng).region
        assert drawn is not None
        kept = drawn.kept(SIZE, SIZE)
        cells = kept_cells(kept[None], spec)
        if cells.any() and not cells.all():
            return kept


def measure(case: Case, frames: Frames, ae: Any, device: torch.device, spec: LatentSpec) -> dict[str, Any]:
    """What came of a case: the verdict; dB of what was given against its own round trip; the way between pictures."""
    right = judge(case.judged(frames), case.combination, case.background).right
    row: dict[str, Any] = {"name": case.name, "cond_type": case.cond_type, "prompt": case.prompt, "seed": case.seed}
    row |= {name: right[name] for name in (*ATTRIBUTES, "all")}
    if case.given:
        trips = round_trip(ae, [picture[None] for _, picture in case.given], device)
        row["given_db"] = min(psnr(frames[place], trip[0]) for (place, _), trip in zip(case.given, trips))
    if case.kept is not None:
        (trip,) = round_trip(ae, [case.clip], device)
        cells = kept_cells(case.kept[None], spec)[0]
        rows, columns = spec.compression[1:]
        kept = cells.repeat_interleave(rows, 0).repeat_interleave(columns, 1).numpy()
        row["given_db"] = psnr(frames[:, kept], trip[:, kept])
    if "given_db" in row:
        row["comes_back"] = row["given_db"] >= LEAST_DB
    if len(case.given) == 2:
        row |= _between(case.clip, frames)
    row["right"] = row["all"] and row.get("in_between", True)
    return row


def _between(drawn: Frames, frames: Frames) -> dict[str, Any]:
    """Whether the object goes evenly from its place in the first drawn frame to that in the last one, as the judge has
    it."""
    found, ends = track(frames), track(drawn[[0, -1]])
    if found is None or ends is None:
        return {"in_between": False}
    share = np.linspace(0.0, 1.0, len(frames))[:, None]
    line = ends.centers[0] * (1 - share) + ends.centers[1] * share
    stray = np.linalg.norm(found.centers - line, axis=1)
    return {"stray": float(stray.max()), "in_between": mostly(stray <= MAX_STRAY)}


def tabulate(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Shares of videos that are right, and how near given frames come back, by condition."""
    return {
        cond_type: _summary([row for row in rows if row["cond_type"] == cond_type])
        for cond_type in dict.fromkeys(row["cond_type"] for row in rows)
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"videos": len(rows), **{name: share(rows, name) for name in (*ATTRIBUTES, "all", "right")}}
    for name, column in (("in between", "in_between"), ("back", "comes_back")):
        if column in rows[0]:
            found[name] = share(rows, column)
    if "given_db" in rows[0]:
        decibels = [row["given_db"] for row in rows]
        found |= {"mean dB": f"{np.mean(decibels):.1f}", "lowest dB": f"{np.min(decibels):.1f}"}
    return found


COLUMNS = ("videos", *ATTRIBUTES, "all", "in between", "right", "back", "mean dB", "lowest dB")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Command line of this tool and the config overrides that are left."""
    parser = config_parser(__doc__)
    add_common(parser)
    parser.add_argument("--pairs", type=int, default=40, help="videos between two pictures")
    parser.add_argument("--num", type=int, default=20, help="videos of every other condition")
    parser.add_argument("--cond_types", "--cond-types", nargs="+", choices=list(REFERENCES), default=list(REFERENCES),
                        help="conditions")  # fmt: skip
    return parser.parse_known_args(argv)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    """Generate, judge, print and write.

    Raises:
        UserError: a value out of range, a folder in use, or anything wrong with the config.
    """
    check_counts(args, pairs=1, num=1, seed=0, eval_batch=1)
    numbers = {"pairs": args.pairs, "num": args.num, "cond_types": args.cond_types}
    with measuring(args, overrides, **numbers) as (pipe, measurement):
        cases = plan_cases(args.pairs, args.num, args.cond_types, args.seed, pipe.spec)
        measurement.make(cases, args.eval_batch, lambda case: case.cond_type, lambda batch: _make(pipe, batch))
        rows, videos, ae = [], [], pipe.models["ae"]
        for case in cases:
            frames = measurement.frames(case.name)
            rows.append(measure(case, frames, ae, pipe.device, pipe.spec))
            right = rows[-1]["right"] and rows[-1].get("comes_back", True)
            videos.append((f"{case.name} {case.prompt}", np.concatenate([case.clip, frames], axis=1), bool(right)))
        print(format_table(tabulate(rows), COLUMNS))
        print(measurement.write_csv(rows))
        print(measurement.write_sheet(videos, SHEET_FRAMES, 4))


def _make(pipe: VideoPipeline, batch: Sequence[Case]) -> list[Frames]:
    result = pipe(
        [case.prompt for case in batch],
        ref=[case.references for case in batch] if len(batch) > 1 else batch[0].references,
        cond_type=batch[0].cond_type,
        seed=[case.seed for case in batch],
        num_frames=len(batch[0].clip),
        progress=False,
    )
    return result.frames


def main(argv: list[str] | None = None) -> None:
    """Measure a model."""
    args, overrides = parse_args(argv)
    evaluate(args, overrides)


if __name__ == "__main__":
    run_main(main)
