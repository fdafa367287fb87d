"""Videos longer than what a model makes at once, in windows."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from opensora.config.commands import SamplingOption
from opensora.diffusion.conditions import build_condition, head_condition
from opensora.diffusion.decode import decode_into
from opensora.diffusion.kept_latents import LATENTS, KeptLatents
from opensora.diffusion.latents import get_noise
from opensora.diffusion.long import texts_of_windows
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.plan import make_plan
from opensora.diffusion.windows import Windows, window_seed
from opensora.models.autoencoder import LatentSpec, as_autoencoder
from opensora.utils.errors import UserError

CAUSAL = LatentSpec((4, 8, 8), is_causal=True)
DEEP = LatentSpec((4, 32, 32), is_causal=False)
SIZE = {"resolution": "256px", "aspect_ratio": "16:9"}


def option(**changes) -> SamplingOption:
    return SamplingOption(**{**SIZE, "num_frames": 513, "window": 129, "guidance_img": 3.0, **changes})


@pytest.fixture(scope="module")
def pipe(tiny_config):
    pipe = VideoPipeline.from_config(tiny_config, window=9)
    nn.init.normal_(pipe.models["model"].cond_in.weight, generator=torch.Generator().manual_seed(0))
    return pipe


@pytest.mark.parametrize(
    ("changes", "spec", "expected"),
    [
        ({}, CAUSAL, (129, 33, 9, 5)),  # latent frames, of a window, in common, windows
        ({"num_frames": 65, "window": 17}, CAUSAL, (17, 5, 1, 4)),  # no room for 33: the last frame
        ({"num_frames": 69, "window": 17}, CAUSAL, (18, 5, 1, 5)),
        ({"num_frames": 133, "overlap": 65}, CAUSAL, (34, 33, 17, 2)),
        ({"num_frames": 65, "window": 17, "overlap": 9}, CAUSAL, (17, 5, 3, 7)),
        ({"num_frames": 256, "window": 128}, DEEP, (64, 32, 8, 3)),
        ({"num_frames": 256, "window": 128, "overlap": 1}, DEEP, (64, 32, 1, 3)),
    ],
)
def test_windows_cover_a_video_once(changes, spec, expected):
    windows = Windows.of(option(**changes), spec)
    assert (windows.latent_frames, windows.window, windows.overlap, windows.count) == expected
    covered = [frame for index in range(windows.count) for frame in range(windows.end(index), windows.end(index + 1))]
    assert covered == list(range(windows.latent_frames))
    for index in range(windows.count):
        new = windows.new(index)
        assert new.stop - new.start == windows.end(index + 1) - windows.end(index) > 0
        assert new.start == (windows.overlap if index else 0)
        assert new.stop <= windows.window
        assert windows.end(index) - new.start == index * windows.advance, "windows start at equal distances"


@pytest.mark.parametrize("changes", [{"window": None}, {"num_frames": 129}, {"num_frames": 1}, {"num_frames": 97}])
def test_what_fits_is_made_at_once_as_before(changes):
    plan = make_plan(option(**changes), CAUSAL, 2)
    assert plan == make_plan(option(**{**changes, "window": None}), CAUSAL, 2)
    assert plan.windows is None
    assert plan.length == plan.num_frames


def test_a_plan_counts_all_windows():
    plan = make_plan(option(), CAUSAL, 2)
    first, after = (
        make_plan(option(num_frames=129), CAUSAL, 2),
        make_plan(option(num_frames=129), CAUSAL, 2, "v2v_head"),
    )
    assert (plan.num_frames, plan.length, plan.latent_size, plan.whole_latent) == (
        129,
        513,
        (33, 24, 42),
        (129, 24, 42),
    )
    assert plan.kept_frames() == slice(0, 513)
    assert plan.forwards == first.forwards + 4 * after.forwards
    assert plan.after.guidance == after.guidance
    assert plan.tokens == first.tokens


@pytest.mark.parametrize(
    ("changes", "cond_type", "told"),
    [
        ({"num_frames": 514}, "t2v", r"num_frames=514.*nearest is 513"),
        ({"window": 128}, "t2v", r"sampling_option\.window=128: .*4k\+1 frames; use 125 or 129"),
        ({"window": 1}, "t2v", r"sampling_option\.window=1: "),
        ({"overlap": 34}, "t2v", r"sampling_option\.overlap=34: .*use 33 or 37"),
        ({"overlap": 129}, "t2v", r"overlap=129: a window of 129 frames has nothing left"),
        ({}, "i2v_loop", r"cond_type i2v_loop fixes the end"),
        ({"num_frames": 33, "window": 17}, "v2v_head", r"would fill the whole video"),
    ],
)
def test_what_cannot_be_is_refused(changes, cond_type, told):
    with pytest.raises(UserError, match=told):
        make_plan(option(**changes), CAUSAL, 2, cond_type)


def test_a_reference_that_is_longer_than_a_window_has_its_video_made_at_once():
    plan = make_plan(option(num_frames=65, window=17), CAUSAL, 2, "v2v_head")
    assert plan.windows is None
    assert plan.num_frames == 65


def test_seeds_follow_from_the_first():
    seeds = [window_seed(42, index) for index in range(50)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 50
    assert seeds == [window_seed(42, index) for index in range(50)]
    assert not {*seeds[1:]} & {window_seed(43, index) for index in range(50)}, "no noise of the next repetition"


def test_given_latents_are_those_of_a_condition():
    z = get_noise([1], 4, (12, 4, 4), torch.device("cpu"))
    given = get_noise([2], 4, (9, 4, 4), torch.device("cpu"))
    assert torch.equal(head_condition(z, given), build_condition(z, "v2v_head", [[given[0]]], is_causal=True))


@pytest.mark.parametrize("overlap", [1, 5])
def test_windows_share_their_latents_to_the_bit(pipe, monkeypatch, overlap):
    given, made, go_on = [], [], type(pipe).go_on

    def watched(self, plan, positive, negative, before, *rest):
        given.append(before.clone())
        made.append(go_on(self, plan, positive, negative, before, *rest))
        return made[-1]

    monkeypatch.setattr(type(pipe), "go_on", watched)
    steps = []
    long = pipe("a red circle", seed=3, num_frames=21, overlap=overlap, on_step=lambda *step: steps.append(step[:2]))
    count = long.plan.windows.count
    assert long.latents.shape == (1, 4, 6, 4, 4)
    assert long.frames[0].shape == (21, 32, 32, 3)
    assert steps == [(step, 4 * count) for step in range(1, 4 * count + 1)]
    assert torch.equal(long.latents[:, :, :3], pipe("a red circle", seed=3).latents), (
        "the first window is the short video"
    )
    shared = 1 + overlap // 4
    for index, (before, window) in enumerate(zip(given, made), 1):
        begin = index * long.plan.windows.advance
        there = long.latents[:, :, begin : begin + window.shape[2]]
        assert before.shape[2] == shared
        assert torch.equal(window[:, :, :shared], before)
        assert torch.equal(window[:, :, : there.shape[2]], there)
    longer = pipe("a red circle", seed=3, num_frames=25, overlap=overlap)
    assert torch.equal(longer.latents[:, :, :6], long.latents), "a longer video begins as the shorter one"


def test_a_batch_is_made_as_its_samples_are(pipe):
    both = pipe(["a red circle", "a blue square"], seed=[3, 4], num_frames=17)
    alone = pipe("a blue square", seed=4, num_frames=17)
    torch.testing.assert_close(both.latents[1], alone.latents[0], rtol=0, atol=1e-4)


def test_each_window_may_have_its_text(pipe):
    plan = pipe._plan(pipe._option({"num_frames": 25}), "t2v", [None])
    assert texts_of_windows(plan, ["a", "b"], [["a2", "a3"], []]) == [["a", "b"], ["a2", "b"], ["a3", "b"]]
    short = pipe._plan(pipe.cfg.sampling_option, "t2v", [None])
    assert texts_of_windows(short, ["a"], []) == [["a"]]
    made = [pipe.make(["a"], [None], "t2v", [3], [""], pipe._option({"num_frames": 17}), next_texts=texts).latents
            for texts in ([], [["a"]], [["a blue square"]])]  # fmt: skip
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0][:, :, :3], made[2][:, :, :3])
    assert not torch.equal(made[0], made[2])


def test_a_killed_run_goes_on_behind_its_last_window(pipe, tmp_path, monkeypatch):
    arguments = (["a"], [None], "t2v", [3], [""], pipe._option({"num_frames": 25}))
    whole = pipe.make(*arguments, folders=[tmp_path / "whole"])
    killed = tmp_path / "killed"

    def kill(step, total, latents):
        if step == 10:  # in the third window of three
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.make(*arguments, on_step=kill, folders=[killed])
    with (killed / LATENTS).open("ab") as file:
        file.write(b"torn")  # what was being written
    seen = []
    again = pipe.make(*arguments, on_step=lambda step, *_: seen.append(step), folders=[killed])
    assert seen == [9, 10, 11, 12], "only the last window is made again"
    assert torch.equal(again.latents, whole.latents)
    assert np.array_equal(again.frames[0], whole.frames[0])


def test_no_more_than_a_window_is_held(pipe):
    """Decoded: frames of at most a window at a time. Latents: mapped from the disk, not in memory."""
    result = pipe("a", seed=1, num_frames=201, num_steps=1)
    ae, seen, parts = as_autoencoder(pipe.models["ae"]), [], []

    class Sink:
        def start(self, sample: int) -> None: ...

        def write(self, frames: np.ndarray) -> None:
            parts.append(len(frames))

    decode = type(ae).decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ae), "decode", lambda self, z: seen.append(z.shape[2]) or decode(self, z))
        decode_into(Sink(), ae, result.latents, slice(0, 201), torch.device("cpu"), torch.float32, None, 9)
    assert sum(parts) == 201
    assert max(parts) <= 9
    assert max(seen) <= 3
    assert len(seen) > 20


def test_kept_latents_are_void_once_they_do_not_fit(tmp_path):
    windows = Windows(num_frames=17, latent_frames=5, window=3, overlap=1)
    kept = KeptLatents(tmp_path / "a", windows, (2, 4, 4))
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)
    assert kept.done == 0
    kept.add(first)
    kept.add(second)
    assert torch.equal(kept.frames(), torch.cat([first, second], 1))
    assert torch.equal(kept.window(1), second)
    assert KeptLatents(tmp_path / "a", windows, (2, 4, 4)).done == 2
    kept.go_back(1)
    assert torch.equal(kept.frames(), first)
    (tmp_path / "a" / LATENTS).write_bytes(b"")
    assert kept.done == 0
    shutil.rmtree(tmp_path / "a")


def test_a_model_without_references_cannot_go_on(tiny_config):
    model = {**tiny_config["model"], "cond_embed": False}
    with pytest.raises(UserError, match=r"num_frames=17 is longer than sampling_option.window=9.*cond_embed"):
        VideoPipeline.from_config({**tiny_config, "model": model}, window=9, num_frames=17)


def test_seconds(tiny_config):
    pipe = VideoPipeline.from_config(tiny_config, window=9, seconds=2.0)
    assert pipe.cfg.sampling_option.num_frames == 17
    with pytest.raises(UserError, match="give one of them"):
        VideoPipeline.from_config(tiny_config, seconds=2.0, num_frames=9)
