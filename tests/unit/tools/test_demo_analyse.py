"""The analyser of the demo world, on drawn clips and on blurred, noisy ones; and the evaluation built on it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from opensora.utils.errors import UserError
from tools.demo.analyse import MAX_BENT, MIN_OVERLAP, analyse, fit_outline, name_motion, psnr
from tools.demo.check_judge import LABELLED, agreement, labelled_clips, main
from tools.demo.evaluate import evaluate, generate, parse_args, plan_cases, summarise, write_results
from tools.demo.scoring import format_table, judge, shares
from tools.demo.world import (
    BOUNCES,
    COLORS,
    HELD_OUT,
    NUM_FRAMES,
    SHAPES,
    Combination,
    Scene,
    combinations,
    draw_clip,
    draw_frame,
    draw_mask,
    sample_scene,
)


def soften(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A 5x5 box blur and noise: what a generated clip may look like."""
    padded = np.pad(clip.astype(float), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    blurred = sum(padded[:, y : y + 64, x : x + 64] for y in range(5) for x in range(5)) / 25
    return np.clip(blurred + rng.normal(0, 10, clip.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("soft", [False, True])
def test_analyser_reads_every_combination(soft: bool):
    verdicts = []
    for i, combination in list(enumerate(combinations("all")))[int(soft) :: 3]:
        rng = np.random.default_rng(i)
        scene = sample_scene(rng, combination)
        clip = draw_clip(scene)
        verdicts.append(judge(soften(clip, rng) if soft else clip, combination, scene.background))
    assert shares(verdicts) == dict.fromkeys(("color", "background", "motion", "shape", "object", "all"), 1.0)


def test_what_bounces_is_read_by_its_turn():
    """Whichever way a clip without one goes is right as well; the turn is wrong where it should go one way."""
    found = set()
    for i, combination in list(enumerate(combinations("long")))[::2]:
        scene = sample_scene(np.random.default_rng(i), combination)
        verdict = judge(draw_clip(scene), combination, scene.background)
        assert verdict.right["all"], verdict.label
        found.add(verdict.analysis.motion)
    assert {"still", *BOUNCES} < found
    scene = Scene("red", "circle", "left and right", "dark", 30, 12.0, (43.0, 32.0), 24.0)
    verdict = judge(draw_clip(scene), Combination("red", "circle", "right"), "dark")
    assert verdict.analysis.motion == "left and right"
    assert not verdict.right["motion"]
    jumps = draw_clip(scene)
    jumps[8:] = np.roll(jumps[8:], 9, axis=1)
    assert analyse(jumps).motion in ("uneven", "diagonal")


def test_empty_and_broken_clips_show_nothing():
    found = analyse(np.full((5, 64, 64, 3), 30, np.uint8))
    assert (found.background, found.color, found.shape, found.motion) == ("dark", "none", "none", "none")
    clip = draw_clip(sample_scene(np.random.default_rng(0), Combination("red", "circle", "still")))
    clip[5] = clip[0, 0, 0]  # the object is gone in one frame
    assert (analyse(clip).motion, analyse(clip).object) == ("none", "absent")


def faulty(fault: str, count: int) -> np.ndarray:
    """A red square that moves right, with a fault in so many of its 17 frames."""
    scene = sample_scene(np.random.default_rng(3), Combination("red", "square", "right"), "dark")
    clip = draw_clip(scene)
    other = draw_clip(dataclasses.replace(scene, color="blue"))
    rows, columns = (np.flatnonzero((clip[:, :, :, 0] > 120).any(axis)) for axis in ((0, 2), (0, 1)))
    for i in range(0, 2 * count, 2):
        frame = clip[i]
        spot = np.flatnonzero((frame[:, :, 0] > 120).any(0))
        if fault == "pieces":
            frame[2:6, 56:60] = frame[rows.mean().astype(int), spot[2]]
        elif fault == "holes":
            frame[rows[5] : rows[10], spot[5] : spot[10]] = frame[0, 0]
        elif fault == "mixed":
            frame[: rows[len(rows) // 2]] = other[i][: rows[len(rows) // 2]]
        elif fault == "uneven":
            frame[:] = np.roll(frame, 6, axis=0)
        elif fault == "none":
            frame[rows[0] : rows[len(rows) // 3]] = frame[0, 0]
    assert len(columns)
    return clip


@pytest.mark.parametrize(
    ("fault", "where"),
    [("pieces", "object"), ("holes", "object"), ("mixed", "color"), ("uneven", "motion"), ("none", "shape")],
)
def test_faults_are_seen_unless_in_few_frames(fault: str, where: str):
    """In up to 3 of 17 frames they are forgiven."""
    assert getattr(analyse(faulty(fault, 9)), where) == fault
    expected = {"object": "whole", "color": "red", "motion": "right", "shape": "square"}
    assert {name: getattr(analyse(faulty(fault, 3)), name) for name in expected} == expected


def test_an_object_that_is_cut_by_the_border():
    clip = draw_clip(sample_scene(np.random.default_rng(3), Combination("red", "square", "still"), "dark"))
    top = int(np.flatnonzero((clip[0, :, :, 0] > 120).any(1))[0])
    assert analyse(clip).object == "whole"
    assert analyse(np.roll(clip, -top, axis=1)).object == "cut"


def test_the_judge_agrees_with_an_eye():
    """On an eighth of the labelled clips; tools/demo/check_judge.py takes all."""
    found = list(labelled_clips(range(0, 291, 8)))
    sums = agreement(found).loc["all"]
    assert sums["clips"] == 37
    assert sums["agreed"] >= 33
    assert sums["clips"] == sums["agreed"] + sums["by judge alone"] + sums["by eye alone"]
    assert 10 <= sums["right by eye"] <= 27


def test_labels_say_what_is_wrong():
    labels = pd.read_csv(LABELLED / "labels.csv")
    assert len(labels) >= 200
    assert labels["right"].isin((0, 1)).all()
    assert labels["first"].isin((0, 1)).all()
    named = labels[labels["fault"].notna()]
    assert set(named["fault"]) <= {"shape", "color", "pieces", "ghost", "cut"}
    assert not named["right"].any()
    assert labels[(labels["right"] == 0) & (labels["grid"] != "clips.mp4")]["fault"].notna().all()


def test_sheets_of_labelled_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = pd.read_csv(LABELLED / "labels.csv")
    monkeypatch.setattr("pandas.read_csv", lambda path: rows[rows["grid"] == "clips_3.mp4"][:5].reset_index(drop=True))
    main(["--sheets", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["000.png", "004.png"]
    with pytest.raises(UserError, match="empty"):
        main(["--sheets", str(tmp_path / "new")])


@pytest.mark.parametrize("radius", [10.0, 13.3, 16.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_overlap_does_not_depend_on_size(shape: str, radius: float):
    bodies = (draw_mask(shape, (31.3, 32.1), radius) > 0.5).astype(float)[None]
    overlap, bent = fit_outline(bodies, shape)
    assert overlap[0] > 0.98
    assert bent[0] == 0


def test_a_dent_is_seen_where_the_overlap_is_good():
    body = draw_mask("triangle", (32, 32), 15) > 0.5
    dented = body.copy()
    dented[30:36, :28] = False
    overlap, bent = fit_outline(np.stack([body, dented]).astype(float), "triangle")
    assert overlap[1] > MIN_OVERLAP["triangle"]
    assert bent[0] == 0
    assert bent[1] > MAX_BENT["triangle"]


def test_a_colour_between_two_is_mixed():
    """An eye hesitates before half of the way."""
    clip = draw_clip(sample_scene(np.random.default_rng(0), Combination("blue", "circle", "still"), "dark"))
    solid = (clip == np.array(COLORS["blue"], np.uint8)).all(-1)
    for share, name in ((0.3, "blue"), (0.46, "mixed")):
        clip[solid] = np.rint((1 - share) * np.array(COLORS["blue"]) + share * np.array(COLORS["cyan"]))
        assert analyse(clip).color == name


def test_motion_names():
    assert [name_motion(*d) for d in ((20, 1), (-20, 1), (2, -15), (0, 9))] == ["right", "left", "up", "down"]
    assert name_motion(6, 0) == "still"
    assert name_motion(15, 14) == "diagonal"


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a) == 99
    assert psnr(a, a + 255) == 0


def test_verdict_names_what_is_wrong():
    clip = draw_clip(sample_scene(np.random.default_rng(0), Combination("red", "circle", "left"), "dark"))
    verdict = judge(clip, Combination("red", "square", "left"), "dark")
    right = {"color": True, "background": True, "motion": True, "shape": False, "object": True, "all": False}
    assert verdict.right == right
    assert verdict.label == "red square left dark (found circle)"


def test_table_shows_percentages():
    lines = format_table({"seen": {"videos": 4, "shape": 0.75}}, ["videos", "shape", "dB"]).splitlines()
    assert lines[0].split() == ["videos", "shape", "dB"]
    assert lines[2].split() == ["seen", "4", "75.0", "%", "-"]


def test_plan_covers_all_held_out_combinations():
    cases = plan_cases(num_seen=60, num_i2v=6, seed=42)
    groups = {name: [c.combination for c in cases if c.group == name] for name in ("held out", "seen", "i2v")}
    assert groups["held out"] == list(HELD_OUT)
    assert len(set(groups["seen"])) == 60
    assert not set(groups["seen"]) & set(HELD_OUT)
    assert len(groups["i2v"]) == 6
    assert [c.seed for c in cases] == list(range(42, 42 + len(cases)))
    assert {c.background for c in cases} == {"dark", "light"}
    assert all(f"on a {c.background} background" in c.prompt for c in cases)
    assert all((c.picture is not None) == (c.group == "i2v") for c in cases)


class PerfectPipeline:
    """Draws what the prompt says, at ``scale`` times the size, after a picture of it; stands in for a trained model."""

    def __init__(self, scale: int = 1, draws_first: bool = False) -> None:
        self.calls: list[dict] = []
        self.scale, self.draws_first = scale, draws_first

    def __call__(self, prompts, **options):
        self.calls.append({"prompts": prompts, **options})
        frames = []
        for i, prompt in enumerate(prompts):
            words = prompt.split()
            motion = words[4]
            combination = Combination(words[1], words[2], motion)
            scene = sample_scene(np.random.default_rng(0), combination, words[-2])
            clip = draw_clip(scene)
            if options["ref"] is not None:
                clip = np.stack([options["ref"][i]] * NUM_FRAMES)  # ignores the motion
            frames.append(clip.repeat(self.scale, axis=1).repeat(self.scale, axis=2))
        images = [clip[0] for clip in frames] if self.draws_first else []
        return SimpleNamespace(frames=frames, images=images, reused=[0.0] * len(frames))


def test_evaluation_of_a_pipeline(tmp_path: Path):
    pipe = PerfectPipeline()
    cases = plan_cases(num_seen=5, num_i2v=3, seed=1)
    generate(pipe, cases, batch_size=4)
    assert [call["cond_type"] for call in pipe.calls] == ["t2v"] * 5 + ["i2v_head"]
    assert [s for call in pipe.calls for s in call["seed"]] == [c.seed for c in cases]
    summary = summarise(cases)
    attributes = ("color", "background", "motion", "shape", "object", "all")
    assert summary["both"] == {"videos": 20, **dict.fromkeys(attributes, 1.0)}
    still = sum(c.combination.motion == "still" for c in cases if c.group == "i2v") / 3
    assert summary["i2v"]["motion"] == pytest.approx(still)
    assert summary["i2v"]["first frame dB"] == 99
    write_results(tmp_path / "out", cases, {"summary": summary})
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert (tmp_path / "out" / "results.json").is_file()
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 3


def test_pictures_made_first_and_large_frames_are_judged(tmp_path: Path):
    pipe, cases = PerfectPipeline(scale=2, draws_first=True), plan_cases(num_seen=0, num_i2v=0, seed=1)[:4]
    generate(pipe, cases, batch_size=4)
    assert cases[0].frames is not None
    assert cases[0].frames.shape == (NUM_FRAMES, 128, 128, 3)
    summary = summarise(cases)
    assert summary["pictures"] == {**summary["both"], "videos": 4}
    write_results(tmp_path, cases, {"summary": summary})
    videos = json.loads((tmp_path / "results.json").read_text())["videos"]
    assert [video["drawn"]["expected"]["motion"] for video in videos] == ["still"] * 4


def test_evaluation_refuses_a_used_folder(tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="empty"):
        evaluate(*parse_args(["configs/x.py", "--out", str(tmp_path)]))
    with pytest.raises(UserError, match="--i2v"):
        evaluate(*parse_args(["configs/x.py", "--out", str(tmp_path / "new"), "--i2v", "-1"]))


def test_pictures_are_first_frames():
    scene = sample_scene(np.random.default_rng(2), Combination("blue", "square", "up"), "light")
    assert (draw_clip(scene)[0] == draw_frame(scene, 0.0)).all()
