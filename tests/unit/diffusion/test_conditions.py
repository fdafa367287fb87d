"""The table of conditions."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from opensora.config.choices import CONDITIONS
from opensora.diffusion import conditions
from opensora.utils.errors import UserError


def test_pixel_frames_match_latent_frames():
    for spans in map(conditions.get_spans, CONDITIONS):
        for span in spans:
            causal, plain = span.latent_frames(True), span.latent_frames(False)
            assert span.pixel_frames(True) == 1 + 4 * (causal - 1)
            assert span.pixel_frames(False) == (1 if span.groups is None else 4 * plain)


def test_batches_may_mix_types():
    z = torch.zeros(3, 2, 4, 3, 3)
    refs = [[torch.ones(2, 1, 3, 3)], None, [torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), 3.0)]]
    cond = conditions.build_condition(z, ["i2v_tail", "t2v", "i2v_loop"], refs, is_causal=True)
    assert cond.shape == (3, 3, 4, 3, 3)
    assert cond[:, 0, :, 0, 0].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert cond[2, 1, :, 0, 0].tolist() == [2, 0, 0, 3]


def test_pictures_are_put_back_for_every_sample():
    z = torch.zeros(2, 2, 3, 2, 2)
    refs = [[torch.full((2, 1, 2, 2), value)] for value in (1.0, 2.0)]
    out = conditions.restore_references(z, "i2v_head", refs)
    assert out[:, 0, :, 0, 0].tolist() == [[1, 0, 0], [2, 0, 0]]
    assert not z.any()
    assert not conditions.restore_references(z, "v2v_head", refs).any()
    assert not conditions.restore_references(z, "i2v_head", [None, []]).any()


def test_short_clips_drop_video_conditions_for_themselves_only():
    weights = {"t2v": 1, "i2v_head": 1, "v2v_head": 5, "v2v_tail_easy": 5}
    before = dict(weights)
    rng = random.Random(0)
    assert set(conditions.choose_conditions(weights, 200, 9, rng)) == {"t2v", "i2v_head"}
    assert set(conditions.choose_conditions(weights, 200, 17, rng)) == {"t2v", "i2v_head", "v2v_head"}
    assert set(conditions.choose_conditions(weights, 200, 18, rng)) == set(weights)
    assert set(conditions.choose_conditions(weights, 200, 9, rng, is_causal=False)) == {"t2v", "i2v_head", "v2v_head"}
    assert weights == before


def test_choice_follows_the_weights_and_images_stay_free():
    weights = {"t2v": 1, "i2v_head": 3, "i2v_tail": 0}
    counts = Counter(conditions.choose_conditions(weights, 4000, 5, random.Random(1)))
    assert counts["i2v_head"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert "i2v_tail" not in counts
    assert conditions.choose_conditions({"i2v_head": 1}, 3, 1, random.Random(0)) == ["t2v"] * 3


def test_runs_are_cut_from_both_ends():
    video = torch.arange(77.0).view(1, 77, 1, 1).expand(3, 77, 2, 2)
    (head, tail), (clip,) = (conditions.get_spans(name) for name in ("i2v_loop", "v2v_tail"))
    assert head.pixel_run(True).cut(video)[0, :, 0, 0].tolist() == [0]
    assert tail.pixel_run(True).cut(video)[0, :, 0, 0].tolist() == [76]
    assert clip.pixel_run(True).cut(video)[0, :, 0, 0].tolist() == list(range(44, 77))
    assert clip.pixel_run(True).cut(video[None])[0, 0, :, 0, 0].tolist() == list(range(44, 77))
    assert clip.latent_run(True).place(20) == slice(11, 20)


def test_runs_of_a_config_in_clips_of_a_length():
    ae = SimpleNamespace(
        is_causal=True, compression=(4, 8, 8), get_latent_size=lambda size: ((size[0] - 1) // 4 + 1, 8, 8)
    )
    weights = {"t2v": 1, "i2v_loop": 1, "v2v_head": 1, "v2v_tail_easy": 0}
    assert [run.name for run in conditions.condition_runs(weights, ae, 65)] == ["head_1", "head_33", "tail_1"]
    assert [run.name for run in conditions.condition_runs(weights, ae, 33)] == ["head_1", "tail_1"]  # none left to make
    assert conditions.condition_runs(weights, ae, 1) == conditions.condition_runs(None, ae, 65) == []


def test_unknown_type_and_short_reference():
    with pytest.raises(UserError, match="unknown cond_type 'i2v_haed'; valid: t2v, i2v_head"):
        conditions.get_spans("i2v_haed")
    with pytest.raises(UserError, match="needs 9 latent frames; the reference has 3"):
        conditions.build_condition(torch.zeros(1, 2, 20, 2, 2), "v2v_head", [[torch.zeros(2, 3, 2, 2)]], True)
