"""Measurements of how videos go on, and of what comes back of what is given: on drawn clips, right and wrong ones."""

import csv

import numpy as np
import pytest
import torch

from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError
from tools.demo import evaluate_frames, evaluate_long
from tools.demo.measured import Measurement
from tools.demo.paths import Track, course, track
from tools.demo.world import BOUNCES, HELD_OUT, Combination, Scene, combinations, draw_clip

CAUSAL = LatentSpec((4, 8, 8), True)
SCENE = Scene("red", "circle", "left and right", "dark", 30, 10.0, (32.0, 40.0), 24.0)
WINDOWS = [range(0, 17), range(16, 33)]


def gone(*xs, half=10.0):
    """The track of an object that is at these x."""
    centers = np.stack([np.asarray(xs, np.float64), np.full(len(xs), 30.0)], axis=1)
    return Track(centers, np.full_like(centers, half))


def goes_on(found, still=False):
    way = course(found, still)
    return max(way.stray, way.speed_step) <= evaluate_long.MOST_STRAY


def test_a_drawn_clip_is_followed_to_a_fraction_of_a_pixel():
    found = track(draw_clip(SCENE, 33))
    expected = 53 - abs(32 + 1.5 * np.arange(33) - 53)  # to the border, and back
    assert found.centers[:, 0] == pytest.approx(expected, abs=0.25)
    assert found.centers[:, 1] == pytest.approx(40, abs=0.25)
    assert found.halves == pytest.approx(10, abs=0.3)
    way = course(found.part(9, 26))
    assert way.turns
    assert max(way.stray, way.speed_step) < 0.3
    assert track(draw_clip(SCENE, 2) * 0) is None


def test_what_goes_on_and_what_does_not():
    even = np.arange(17.0)
    assert goes_on(gone(*(20 + 1.5 * even)))
    assert goes_on(gone(*(53 - 1.5 * abs(even - 6.25))))  # back from the border, at 54 - 1
    assert goes_on(gone(*(53 - 1.5 * abs(even - 12.25).clip(1))))  # its corner rounded off
    assert not goes_on(gone(*(40 - 1.5 * abs(even - 6.25))))  # back in mid-air
    assert not goes_on(gone(*(53 - 1.5 * (6 - even).clip(0) - 2.2 * (even - 6).clip(0))))  # back, and faster
    assert not goes_on(gone(*(53 - 1.5 * abs(even - 6.25) - 4 * (even > 8))))  # back, and a jump
    assert not goes_on(gone(*(20 + even + 4 * (even > 8))))  # jumps
    assert not goes_on(gone(*(20 + even + 0.7 * (even - 8).clip(0))))  # hurries on
    assert not goes_on(gone(*(20 + even.clip(max=8))))  # stops
    assert goes_on(gone(*np.full(17, 30.0)), still=True)
    assert not goes_on(gone(*(30 + 0.3 * even)), still=True)


def test_windows_and_seams_of_a_video():
    case = evaluate_long.Case("a", Combination("red", "circle", "left and right"), "dark", 33, 1)
    clip = draw_clip(SCENE, 33)
    first, second = evaluate_long.measure(case, clip, WINDOWS)
    assert first["all"]
    assert "goes_on" not in first
    assert second["all"]
    assert second["goes_on"]
    assert second["turns"]
    flash, jump = clip.copy(), clip.copy()
    flash[17:] += 9
    jump[17:] = np.roll(jump[17:], 4, axis=1)
    assert not list(evaluate_long.measure(case, flash, WINDOWS))[1]["no_flash"]
    assert list(evaluate_long.measure(case, flash[:18], [WINDOWS[0], range(16, 18)]))[-1]["window"] == 0
    (_, row) = evaluate_long.measure(case, jump, WINDOWS)
    assert (row["goes_on"], row["no_flash"]) == (False, True)
    (_, row) = evaluate_long.measure(case, clip * 0 + 30, WINDOWS)
    assert (row["goes_on"], row["object"]) == (False, False)
    table = evaluate_long.tabulate([first, second, row])
    assert (table["all"]["windows"], table["all"]["seams"], table["window 2"]["go on"]) == (3, 2, 0.5)


def test_prompts_are_of_motions_that_go_on():
    cases = evaluate_long.plan_cases(30, [65, 129], 42)
    assert len({(case.prompt, case.length) for case in cases}) == 60
    assert [case.seed for case in cases] == list(range(42, 102))
    motions = [case.combination.motion for case in cases]
    assert {motions.count(motion) for motion in ("still", *BOUNCES)} == {20}
    assert not {case.combination for case in cases} & set(HELD_OUT)


def test_a_measurement_resumes_and_refuses_another(tmp_path):
    made = []

    def make(batch):
        made.extend(case.name for case in batch)
        if len(made) == 3:
            raise KeyboardInterrupt
        return [np.full((2, 4, 4, 3), case.seed, np.uint8) for case in batch]

    cases = evaluate_long.plan_cases(3, [65], 1)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Measurement(folder, {"a": 1}).make(cases, 1, lambda case: case.length, make)
    again = Measurement(folder, {"a": 1})
    again.make(cases, 2, lambda case: case.length, make)
    assert made == ["65_000", "65_001", "65_002", "65_002"]
    assert again.frames("65_001").max() == 2
    with pytest.raises(UserError, match="holds a measurement of something else, see"):
        Measurement(folder, {"a": 2})
    with pytest.raises(UserError, match="is not an empty folder"):
        Measurement(tmp_path, {})


def frames_case(cond_type):
    cases = evaluate_frames.plan_cases(3, 3, [cond_type], 5, CAUSAL)
    return next(case for case in cases if case.combination.motion != "still")


class SameAgain(torch.nn.Module):
    """An autoencoder that loses nothing."""

    def encode(self, x, sample_posterior=True):
        return x

    decode = forward = encode


def measured(case, frames):
    return evaluate_frames.measure(case, frames, SameAgain(), torch.device("cpu"), CAUSAL)


def test_two_pictures_and_what_lies_between():
    case = frames_case("frames")
    assert [place for place, _ in case.given] == [0, -1]
    row = measured(case, case.clip)
    assert row["right"]
    assert row["comes_back"]
    assert row["stray"] < 0.5
    late = case.clip[[0] * 9 + [16] * 8]  # jumps in the middle
    row = measured(case, late)
    assert (row["in_between"], row["right"], row["comes_back"]) == (False, False, True)
    other = case.clip.copy()
    other[-1] = np.roll(other[-1], 3, axis=0)
    assert not measured(case, other)["comes_back"]


def test_a_region_is_compared_where_whole_latents_are_kept():
    case = frames_case("region")
    kept = (
        evaluate_frames.kept_cells(case.kept[None], CAUSAL)[0].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    )
    frames = case.clip.copy()
    frames[:, ~kept] = 0
    assert measured(case, frames)["given_db"] == 99
    frames[:, kept] += 30
    assert not measured(case, frames)["comes_back"]
    mask = case.references[1]
    assert set(np.unique(mask)) == {0, 255}
    assert mask.shape == (64, 64, 3)


def test_every_condition_is_given_what_it_takes():
    cases = evaluate_frames.plan_cases(1, 1, list(evaluate_frames.REFERENCES), 3, CAUSAL)
    sizes = {case.cond_type: [np.shape(getattr(each, "media", each)) for each in case.references] for case in cases}
    picture, clip = (64, 64, 3), (9, 64, 64, 3)
    assert sizes == {
        "frames": [picture, picture],
        "region": [(17, *picture), picture],
        "extend_right": [clip],
        "extend_left": [clip],
        "i2v_head": [picture],
        "i2v_tail": [picture],
        "i2v_loop": [picture, picture],
        "v2v_head": [(33, *picture)],
    }
    assert next(case for case in cases if case.cond_type == "v2v_head").combination in combinations("long")
    assert [len(case.judged(case.clip)) for case in cases] == [17] * 8


def test_from_the_command_line(tiny_config_file, tmp_path, capsys, monkeypatch):
    common = [str(tiny_config_file), "--num", "1", "--num_steps", "1", "--resolution", "64px"]
    long = [*common, "--out", str(tmp_path / "long"), "--lengths", "17", "--window", "9"]
    evaluate_long.main(long)
    told = capsys.readouterr().out
    assert "window 2" in told
    with (tmp_path / "long" / "results.csv").open() as file:
        assert [row["window"] for row in csv.DictReader(file)] == ["0", "1"]
    assert (tmp_path / "long" / "sheet.png").is_file()
    monkeypatch.setattr(evaluate_long.VideoPipeline, "__call__", None)
    evaluate_long.main(long)  # all is there
    assert capsys.readouterr().out == told
    monkeypatch.undo()
    evaluate_frames.main([*common, "--out", str(tmp_path / "a"), "--pairs", "1", "--cond-types", "frames", "region"])
    told = capsys.readouterr().out
    assert "region" in told
    assert "lowest dB" in told
    with pytest.raises(UserError, match="--lengths 9: this config makes so many frames at once"):
        evaluate_long.main([*long[:-3], "9", "--window", "9", "--out", str(tmp_path / "b")])
    with pytest.raises(UserError, match="makes videos of 32 x 32 pixels; the demo world has 64 x 64"):
        evaluate_long.main([str(tiny_config_file), "--out", str(tmp_path / "b")])
    with pytest.raises(UserError, match="--num is 0"):
        evaluate_long.main([*long, "--num", "0"])
