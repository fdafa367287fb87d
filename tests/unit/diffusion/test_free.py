"""Conditions that give anything anywhere: what training draws of them."""

import random

import pytest
import torch

from opensora.config.choices import CONDITIONS
from opensora.diffusion import conditions
from opensora.diffusion.free import FreeCondition, PlacedLatents, Rectangle, kept_cells
from opensora.diffusion.spans import Span
from opensora.encoded.memory import EncodedMemory
from opensora.models.autoencoder import LatentSpec
from opensora.registry import MODELS, build_module
from opensora.training.diffusion.inputs import InputEncoder, InputOptions

FREE = [name for name in CONDITIONS if isinstance(conditions.get_condition(name), FreeCondition)]
CAUSAL, PLAIN = LatentSpec((4, 8, 8), True), LatentSpec((4, 8, 8), False)


@pytest.mark.parametrize("spec", [CAUSAL, PLAIN])
@pytest.mark.parametrize("name", FREE)
def test_draws_lie_in_the_video_and_leave_something_to_make(name, spec):
    for frames in (2, 3, 5, 33):
        parts = conditions.drawn_parts(name, frames, spec)
        assert bool(parts) == conditions.fits(name, frames, spec.is_causal)
        for part in parts:
            totals = set()
            for row in range(20):
                given, taken = part.given(row), []
                for span in given.spans:
                    taken += range(frames)[span.latent_run(spec.is_causal).place(frames)]
                assert len(set(taken)) == len(taken)  # none twice
                assert len(taken) < frames or given.region is not None
                assert part.given(row) == given
                totals.add(len(taken))
                pixels = (frames - 1) * 4 + 1 if spec.is_causal else frames * 4
                clip = torch.arange(float(pixels)).view(1, -1, 1, 1).expand(3, -1, 16, 16)
                for span, piece in zip(given.spans, part.pieces(row, clip)):
                    assert piece.shape[1] == span.pixel_frames(spec.is_causal)
            assert len(totals) == 1  # whatever the row, so that batches can be stacked
    assert not conditions.fits(name, 1, True)


def test_draws_stay_what_they_are():
    """Caches hold what was drawn when they were written."""
    parts = conditions.drawn_parts("frames", 9, CAUSAL)
    assert [[(s.at, s.groups) for s in part.given(3).spans] for part in parts] == [
        [(8, None)],
        [(0, None), (8, None)],
        [(7, 1), (0, 1)],
        [(7, 1), (0, None)],
    ]
    part = conditions.drawn_parts("region", 9, CAUSAL)[1].given(3).region
    assert [round(side, 4) for side in (part.top, part.left, part.bottom, part.right)] == [
        0.0,
        0.3409,
        1.0,
        0.7338,
    ]
    assert [part.given(0).spans for part in conditions.drawn_parts("extend_left", 9, CAUSAL)] == [
        (Span("tail", 0, groups),) for groups in (1, 2, 4)
    ]


def test_every_place_is_drawn():
    (picture, *_) = conditions.drawn_parts("frames", 9, CAUSAL)
    assert {picture.given(row).spans[0].at for row in range(200)} == set(range(9))


def test_a_latent_pixel_is_given_where_all_of_it_is_kept():
    kept = torch.ones(1, 16, 24, dtype=torch.bool)
    kept[0, 7, 16] = False  # one pixel of the cell in the upper right
    assert kept_cells(kept, CAUSAL).tolist() == [[[True, True, False], [True, True, True]]]
    moving = torch.ones(9, 8, 8, dtype=torch.bool)
    moving[5] = False  # the first frame of the third latent
    assert kept_cells(moving, CAUSAL)[:, 0, 0].tolist() == [True, True, False]
    assert kept_cells(moving[:8], PLAIN)[:, 0, 0].tolist() == [True, False]
    rectangle = Rectangle(0, 0.5, 0.5, 1, inside=True)
    assert kept_cells(rectangle.kept(16, 16)[None], CAUSAL).int().tolist() == [[[0, 1], [0, 0]]]


def test_placed_latents_fill_their_places():
    z, cells = torch.zeros(2, 2, 5, 1, 2), torch.tensor([[[True, False]]])
    placed = PlacedLatents((Span(3, 0), Span(1, 1)), [torch.full((2, 1, 1, 2), 7.0), torch.full((2, 1, 1, 2), 8.0)])
    half = PlacedLatents((Span("head", 0, 4),), [torch.full((2, 5, 1, 2), 9.0)], cells)
    cond = conditions.build_condition(z, ["frames", "region"], [placed, half], is_causal=True)
    assert cond[0, 0, :, 0, 0].tolist() == [0, 1, 0, 1, 0]
    assert cond[0, 1, :, 0, 0].tolist() == [0, 8, 0, 7, 0]
    assert cond[1, 0, 2].tolist() == [[1, 0]]
    assert cond[1, 2, 2].tolist() == [[9, 0]]
    assert torch.equal(conditions.restore_references(z, ["frames", "region"], [placed, half]), cond[:, 1:])
    clip = PlacedLatents((Span(1, 0, 1),), [torch.full((2, 2, 1, 2), 7.0)])
    assert not conditions.restore_references(z[:1], "frames", [clip]).any()  # as drawn


@pytest.fixture(scope="module")
def encoders(tiny_config):
    torch.manual_seed(0)
    return [build_module(dict(tiny_config[k]), MODELS, torch_dtype=torch.float32) for k in ("ae", "t5", "clip")]


def batch_of(video):
    size = tuple(video.shape[2:])
    return {"video": video, "text": ["a"] * len(video), "index": [*range(len(video))], "size": [size] * len(video)}


@pytest.mark.parametrize("name", FREE)
def test_training_gives_what_was_drawn(encoders, name):
    """The mask is that of a layout of the row, and what is not given is not seen through it; kept or encoded anew."""
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = InputOptions(condition_weights={name: 1}, patch_size=1)
    found = []
    for memory in (None, EncodedMemory()):
        prepared = InputEncoder(*encoders, options, memory)(batch_of(video), torch.Generator().manual_seed(4))
        assert prepared["conditions"] == [name, name]
        found.append(prepared["inputs"]["cond"])
    assert torch.allclose(*found, atol=1e-5)
    given = found[0][..., 0].unflatten(1, (3, 4, 4)).bool()
    for row, mask in enumerate(given):
        masks = []
        for part in conditions.drawn_parts(name, 3, CAUSAL):
            placed = part.placed(row, torch.ones(1, 99, 4, 4)[:, : _total(part, row)], 32, 32)
            masks.append(conditions.build_condition(torch.zeros(1, 1, 3, 4, 4), name, [placed], True)[0, 0].bool())
        assert any(torch.equal(mask, each) for each in masks)


def _total(part, row):
    return sum(span.latent_frames(True) for span in part.given(row).spans)


def test_old_conditions_draw_as_before(encoders):
    """A condition of one's own choice beside the old ones does not change their stream of random numbers."""
    video = torch.rand(4, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weights = {"t2v": 1, "i2v_head": 1}
    made = []
    for extra in ({}, {"frames": 0.0, "region": 0.0}):
        encode = InputEncoder(*encoders, InputOptions(condition_weights={**weights, **extra}))
        generator = torch.Generator().manual_seed(2)
        made.append((encode(batch_of(video), generator)["inputs"], generator.get_state()))
    (a, state), (b, same) = made
    assert torch.equal(state, same)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_not_of_a_region_is_not_seen(encoders):
    """Neither by the latents next to it."""
    ae = encoders[0]
    (part, _) = conditions.drawn_parts("region", 3, CAUSAL)
    clip = torch.rand(3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    kept = part.given(5).region.kept(32, 32)
    (one,), (two,) = part.pieces(5, clip), part.pieces(5, torch.where(kept, clip, random.Random(0).random()))
    assert torch.equal(one, two)
    assert torch.equal(one[..., kept], clip[..., kept])
    assert torch.equal(ae.encode_stored(one[None]), ae.encode_stored(two[None]))
