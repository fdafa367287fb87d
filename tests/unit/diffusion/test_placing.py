"""Frames anywhere: places as people write them, and what comes of them through the pipeline."""

import numpy as np
import pytest
import torch

from opensora.config.commands import InferenceOptions
from opensora.config.load import load_config
from opensora.diffusion import stages
from opensora.diffusion.conditions import get_condition
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.placing import Reference
from opensora.diffusion.references import Placed, locate_references
from opensora.diffusion.solvers import SOLVERS, make_steps, solve
from opensora.diffusion.spans import Span
from opensora.diffusion.velocity import holding
from opensora.generation.requests import read_requests
from opensora.models.autoencoder import LatentSpec
from opensora.utils.errors import UserError
from opensora.utils.video import save_image, save_video

CAUSAL, PLAIN = LatentSpec((4, 8, 8), True), LatentSpec((4, 8, 8), False)


def picture(*place, name="a.png"):
    return Reference(name, 1, True, (*place, None)[:2] if place else None)


def clip(frames, *place, name="b.mp4"):
    return Reference(name, frames, False, (*place, None)[:2] if place else None)


def spans(references, spec=CAUSAL, frames=129, cond_type="frames"):
    return [
        (each.span.at, each.span.groups) for each in get_condition(cond_type).locate(references, spec, frames, frames)
    ]


def test_places_on_the_grid_of_a_causal_autoencoder():
    assert spans([picture(0), picture(64), clip(99, 96, 128)]) == [(0, None), (16, None), (24, 8)]
    assert spans([picture(-1), picture(-129)]) == [(32, None), (0, None)]
    assert spans([clip(40, -33, -1), clip(40, 0, 32)]) == [(24, 8), (0, 8)]  # in-between of two clips, in any order
    assert spans([clip(40, 8)]) == [(2, 9)]  # as much as whole groups take
    assert spans([clip(40, 120)]) == [(30, 2)]  # and as fits
    assert spans([clip(40, 8, 8)]) == [(2, None)]


def test_places_on_the_grid_of_one_that_is_not():
    assert spans([picture(0), picture(-1), picture(8)], PLAIN, 32) == [(0, None), (7, None), (2, None)]
    assert spans([clip(40, 0, 7), clip(40, -8, -1)], PLAIN, 32) == [(0, 2), (6, 2)]
    assert spans([clip(11, 8)], PLAIN, 32) == [(2, 2)]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([picture(63)], r"a\.png@63: .* codes 4 frames together, and a picture cannot lie at frame 63; use 60 or 64"),
        ([picture()], r"a\.png does not say where in the video it lies: a\.png@0 is its beginning"),
        ([picture(129)], r"a\.png@129: the video has no frame 129; its 129 frames are 0 to 128, or -129 to -1"),
        ([picture(-130)], r"a\.png@-130: the video has no frame -130"),
        ([picture(0, 8)], r"a\.png@0-8: a picture gives one frame, such as a\.png@0"),
        ([clip(99, 95, 128)], r"b\.mp4@95-128: .* a clip's beginning cannot lie at frame 95; use 92 or 96"),
        ([clip(99, 96, 126)], r"b\.mp4@96-126: .* a clip's end cannot lie at frame 126; use 124 or 128"),
        ([clip(99, 32, 16)], r"b\.mp4@32-16 ends before it begins"),
        ([clip(20, 96, 128)], r"reference too short: b\.mp4 has 20 frames, b\.mp4@96-128 needs 33"),
        ([clip(99, 0, 32), picture(32)], r"b\.mp4@0-32 and a\.png@32 both give frames 29 to 32: move one"),
        ([picture(0), picture(0)], r"a\.png@0 and a\.png@0 both give frame 0"),
        ([clip(200, 0)], r"fill the whole video of 129 frames: nothing is left to make"),
    ],
)
def test_places_that_cannot_be(references, message):
    with pytest.raises(UserError, match=message):
        spans(references)


def test_a_clip_to_extend_takes_half_of_the_video():
    assert spans([clip(40)], frames=33, cond_type="extend_right") == [("head", 4)]
    assert spans([clip(8)], frames=33, cond_type="extend_left") == [("tail", 1)]
    assert spans([picture()], frames=33, cond_type="extend_right") == [("head", None)]
    (right,) = get_condition("extend_right").locate([clip(40)], CAUSAL, 33, 33)
    (left,) = get_condition("extend_left").locate([clip(40)], CAUSAL, 33, 33)
    assert (right.end, left.end) == ("tail", "head")  # the video goes on from the end of a clip
    with pytest.raises(UserError, match=r"one clip is needed, not 2 references"):
        spans([clip(9), clip(9)], cond_type="extend_left")
    with pytest.raises(UserError, match=r"b\.mp4@0: places in the video are for cond_type frames"):
        spans([clip(9, 0)], cond_type="extend_right")


def test_places_in_texts(tmp_path):
    save_image(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png")
    save_image(np.zeros((8, 8, 3), np.uint8), tmp_path / "a@2.png")
    (tmp_path / "odd@3").write_bytes((tmp_path / "a.png").read_bytes())
    found = locate_references("a.png@0; a@2.png@-1 ;odd@3", tmp_path, tmp_path)
    assert found == [f"{tmp_path}/a.png@0", f"{tmp_path}/a@2.png@-1", f"{tmp_path}/odd@3"]


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return VideoPipeline.from_config(tiny_config, num_steps=1, num_frames=17)


@pytest.fixture
def conditions(monkeypatch):
    """Each condition that is built."""
    found, build, head = [], stages.build_condition, stages.head_condition

    def kept(make):
        def made(*args):
            found.append(make(*args))
            return found[-1]

        return made

    monkeypatch.setattr(stages, "build_condition", kept(build))
    monkeypatch.setattr(stages, "head_condition", kept(head))
    return found


def given(conditions):
    """Share of each latent frame that is given, of each condition."""
    return [cond[0, 0].mean((1, 2)).tolist() for cond in conditions]


def noise(*size):
    return np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)


def test_frames_through_the_pipeline(pipe, conditions, tmp_path):
    path = save_video(noise(9, 32, 32), tmp_path / "b.mp4", 8)
    save_image(noise(32, 32), tmp_path / "a.png")
    made = pipe(["x", "y"], ref=[f"{tmp_path}/a.png@0;{path}@8-16", [Placed(noise(32, 32), 4)]], cond_type="frames")
    assert made.frames[0].shape == (17, 32, 32, 3)
    assert given(conditions) == [[1, 0, 1, 1, 1]]
    with pytest.raises(UserError, match=r"the given frames@0: a place in the video is for cond_type frames, not i2v"):
        pipe("x", ref=Placed(noise(32, 32), 0), cond_type="i2v_head")


def test_key_frames_of_a_long_video_go_to_their_windows(pipe, conditions):
    ref = [Placed(noise(32, 32), 0), Placed(noise(32, 32), 24), Placed(noise(9, 32, 32), -9, -1)]
    pipe("x", ref=ref, cond_type="frames", num_frames=41, window=17, overlap=5)
    assert given(conditions) == [[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]


def test_what_is_black_in_a_mask_is_not_seen(pipe, conditions):
    """Whatever the reference holds there, the model is given the same."""
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, :20] = 255  # two and a half columns of latents
    one, other = noise(17, 32, 32), noise(17, 32, 32)
    other[:, :, 20:] = 7
    for clip in (one, other):
        pipe("x", ref=[clip, mask], cond_type="region", seed=1)
    other[:, :, :8] = 7
    pipe("x", ref=[other, mask], cond_type="region", seed=1)
    assert torch.equal(conditions[0], conditions[1])
    assert not torch.equal(conditions[0], conditions[2])
    moving = np.repeat(mask[None], 17, 0)
    moving[5] = 0
    pipe("x", ref=[one, moving], cond_type="region", seed=1)
    assert given(conditions) == [[0.5] * 5] * 3 + [[0.5, 0.5, 0, 0.5, 0.5]]
    for wrong, message in (
        (mask * 0, "all black"),
        (mask[:16], "is 32 x 16 pixels, the given frames 32 x 32: draw the mask on a frame of the reference"),
        ("gone.png", r"mask: image not found: gone\.png"),
        (moving[:9], "too short: the given frames has 9 frames, the video 17"),
    ):
        with pytest.raises(UserError, match=message):
            pipe("x", ref=[one, wrong], cond_type="region")


def test_pictures_and_regions_are_put_back_and_clips_stay_as_drawn(pipe):
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, :20] = 255
    frames = [Placed(noise(32, 32), 4), Placed(noise(5, 32, 32), -5, -1)]
    for cond_type, ref in (("frames", frames), ("region", [noise(17, 32, 32), mask])):
        for keep in (False, True):
            made = pipe("x", ref=ref, cond_type=cond_type, seed=1, keep_given=keep, num_steps=2)
            (refs,) = pipe.encode_references([ref], made.plan, [1])
            exact = conditions_of(made.latents, cond_type, refs.exact())
            close = torch.isclose(made.latents, exact[:, 1:], atol=1e-5) & (exact[:, :1] > 0)
            share = close.float().mean((1, 3, 4))[0].tolist()
            clips = 1.0 if keep else 0.0  # at every step, or not at all
            assert share == ([0, 1, 0, clips, clips] if cond_type == "frames" else [0.5] * 5)


def conditions_of(latents, cond_type, refs):
    return stages.build_condition(latents, cond_type, [refs], True)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_what_is_kept_goes_straight_from_its_noise(solver):
    """Whatever the model says of it."""
    noise, given, mask = torch.randn(1, 4, 2), torch.randn(1, 4, 2), torch.tensor([1.0, 0, 1, 0])[None, :, None]
    seen = []
    held = holding(lambda x, t, step: seen.append((x, t)) or torch.ones_like(x), mask, given)
    out = solve(SOLVERS.get(solver), held, noise, make_steps([1.0, 0.7, 0.2, 0.0]))
    assert torch.allclose(out[:, ::2], given[:, ::2], atol=1e-5)
    assert torch.allclose(out[:, 1::2], noise[:, 1::2] - 1, atol=1e-5)
    assert all(torch.allclose(x[:, ::2], (t * noise + (1 - t) * given)[:, ::2], atol=1e-5) for x, t in seen)


def requests(tiny_config, folder, **keys):
    return read_requests(load_config({**tiny_config, "prompt": "x", **keys}, InferenceOptions), folder)


def test_the_mask_of_a_request(tiny_config, tmp_path):
    (request,) = requests(tiny_config, tmp_path, cond_type="region", ref="a.mp4", mask="m.png")
    assert (request.refs, request.mask) == (("a.mp4", "m.png"), "m.png")
    with pytest.raises(UserError, match="--mask is missing: cond_type region wants what is white"):
        requests(tiny_config, tmp_path, cond_type="region", ref="a.mp4")
    with pytest.raises(UserError, match="--mask is given but cond_type is i2v_head; --cond_type region keeps"):
        requests(tiny_config, tmp_path, cond_type="i2v_head", ref="a.mp4", mask="m.png")


def test_regions_and_ends_are_of_videos_made_at_once(pipe):
    long = dict(num_frames=41, window=17, overlap=5)
    for cond_type, message in (("region", "fixes all frames of a video"), ("extend_left", "fixes the end of a video")):
        with pytest.raises(UserError, match=message):
            pipe("x", ref=[noise(41, 32, 32)], cond_type=cond_type, **long)


def test_spans_by_number():
    assert Span(3, 0, 2).pixel_run(True) == Span(3, 0, 2).pixel_run(True, 4)
    assert (Span(3, 0, 2).pixel_run(True).place(99), Span(3, 0, 2).latent_run(True).place(9)) == (
        slice(12, 21),
        slice(3, 6),
    )
    assert (Span(3, 0, 2).pixel_run(False).place(99), Span(3, 0, 2).latent_run(False).place(9)) == (
        slice(12, 20),
        slice(3, 5),
    )
