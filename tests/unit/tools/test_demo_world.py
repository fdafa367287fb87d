"""The demo world: what it holds out, how it is drawn and described, and the clips that make_clips.py writes."""

import csv
from itertools import combinations as pairs
from pathlib import Path

import numpy as np
import pytest

from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.video import read_video
from tools.demo import synonyms
from tools.demo.captions import caption_and_background, plain_caption, random_caption
from tools.demo.make_clips import COLUMNS, make_clip, make_clips, make_scene
from tools.demo.wordings import WORDS
from tools.demo.world import (
    BACKGROUNDS,
    BOUNCES,
    COLORS,
    DIRECTIONS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    SHORT_MOTIONS,
    SIZE,
    Combination,
    center_of,
    combinations,
    draw_clip,
    draw_mask,
    room,
    sample_scene,
)

PARTS = (tuple(COLORS), SHAPES, SHORT_MOTIONS)


def test_splits_are_disjoint_and_complete():
    train, held_out, every = (combinations(split) for split in ("train", "held_out", "all"))
    assert len(every) == 90
    assert len(held_out) == 15
    assert set(held_out) == set(HELD_OUT)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(every)
    with pytest.raises(ValueError, match="held_out"):
        combinations("test")


def test_every_pair_of_held_out_attributes_is_trained():
    train = combinations("train")
    for first, second in pairs(range(3), 2):
        seen = {(c[first], c[second]) for c in train}
        assert seen == {(a, b) for a in PARTS[first] for b in PARTS[second]}


def test_scenes_stay_inside_and_travel():
    for i, combination in enumerate(combinations("all")):
        scene = sample_scene(np.random.default_rng(i), combination)
        clip = draw_clip(scene)
        assert clip.shape == (17, 64, 64, 3)
        assert clip.dtype == np.uint8
        border = np.concatenate([clip[:, [0, -1]].reshape(-1, 3), clip[:, :, [0, -1]].reshape(-1, 3)])
        assert (border == scene.level).all()
        assert 10 <= scene.radius <= 16
        assert scene.travel >= 14 or combination.motion == "still"
        assert (clip[0] == clip[-1]).all() == (combination.motion == "still")


def test_what_bounces_goes_on_evenly_and_turns_at_the_border():
    """For any time: as far each frame, but where it turns, and never beyond the border."""
    for i, combination in enumerate(combinations("long")):
        scene = sample_scene(np.random.default_rng(i), combination)
        least, greatest = room(scene.radius)
        path = np.array([center_of(scene, k / 16) for k in range(129)])
        along = path[:, 1] if combination.motion == "up and down" else path[:, 0]
        other = path[:, 0] if combination.motion == "up and down" else path[:, 1]
        assert np.ptp(other) == 0
        assert least - 1e-9 <= along.min() <= along.max() <= greatest + 1e-9
        steps = np.diff(along)
        turns = np.abs(np.abs(steps) - abs(scene.travel) / 16) > 1e-9
        assert (np.sign(steps[0]) == np.sign(scene.travel)) or turns[0]
        assert turns.mean() < 0.3
        assert (np.minimum(along - least, greatest - along)[:-1][turns] < abs(scene.travel) / 16).all()
    assert {c.motion for c in combinations("long")} == {*BOUNCES, "still"} == {*MOTIONS} - {*DIRECTIONS}
    assert not {*combinations("long")} & {*HELD_OUT}


def test_clips_that_go_on_are_part_of_a_table(tmp_path):
    """The others are those of a table without them."""
    scenes = [make_scene(i, 3, "train", 0.5) for i in range(200)]
    for i, (scene, text, frames) in enumerate(scenes):
        if scene.motion in DIRECTIONS:
            assert (scene, text, frames) == make_scene(i, 3, "train")
    long = [frames for scene, _, frames in scenes if scene.motion in BOUNCES]
    assert {*long} == {17, 33}
    assert {frames for scene, _, frames in scenes if scene.motion in DIRECTIONS} == {17}
    index = next(i for i, (_, _, frames) in enumerate(scenes) if frames == 33)
    (tmp_path / "clips").mkdir()
    row = make_clip(index, tmp_path, 3, "train", 0.5)
    assert row["num_frames"] == 33
    assert read_video(row["path"])[0].shape == (33, SIZE, SIZE, 3)
    with pytest.raises(UserError, match="long-share is 1.5"):
        make_clips(tmp_path / "other", num=1, seed=0, long_share=1.5)


def test_masks_have_the_area_of_their_shape():
    for shape, area in (("circle", np.pi), ("square", 4.0), ("triangle", 2.0)):
        mask = draw_mask(shape, (31.3, 33.8), 12.0)
        assert mask.sum() == pytest.approx(area * 12**2, rel=0.02)
        rows = np.flatnonzero(mask.max(1))
        assert 24 <= rows[-1] - rows[0] + 1 <= 26
    with pytest.raises(ValueError, match="circle, square, triangle"):
        draw_mask("star", (32, 32), 12)


def words_of(text: str) -> set[str]:
    return set(text.lower().rstrip(".。").replace(",", "").split())


def test_captions_name_what_the_scene_shows():
    texts, named = [], []
    for i in range(400):
        scene, _, _ = make_scene(i, 7, "train", 0.4)
        text, background = caption_and_background(scene, np.random.default_rng(i))
        texts.append(text.lower().rstrip("."))
        named.append(background is not None)
        if not text.isascii():
            continue
        words = words_of(text)
        color, shape = (
            {word, *" ".join(others[word]).split()}
            for word, others in ((scene.color, synonyms.COLORS), (scene.shape, synonyms.SHAPES))
        )
        assert color & words
        assert shape & words
        assert len(words) <= 16
        if scene.motion == "still":
            assert {"still", "place", "not", "motionless"} & words
        else:
            assert any(word.startswith(scene.motion.split()[-1]) for word in words) or "side" in words
            assert ("and" in words or "side" in words) == (scene.motion in BOUNCES)
        other = next(name for name in BACKGROUNDS if name != scene.background)
        assert f"{other} background" not in text.lower()
        assert ("background" in text.lower()) == (background is not None)
    assert 0.65 < np.mean(named) < 0.85
    assert len(set(texts)) > 200
    assert 0.05 < np.mean([not text.isascii() for text in texts]) < 0.15


def test_other_words_are_of_one_thing_only():
    for table in (
        synonyms.COLORS,
        synonyms.SHAPES,
        synonyms.BACKGROUNDS,
        synonyms.CHINESE_COLORS,
        synonyms.CHINESE_SHAPES,
    ):
        for one, other in pairs(table, 2):
            assert not set(table[one]) & set(table[other])
    assert not {
        word for table in (synonyms.COLORS, synonyms.SHAPES) for words in table.values() for word in words
    } & set(WORDS)


def test_chinese_says_all_of_it():
    rng = np.random.default_rng(1)
    for combination in {*combinations("all"), *combinations("long")}:
        text = synonyms.chinese(combination, "dark", rng)
        assert any(word in text for word in synonyms.CHINESE_COLORS[combination.color])
        assert any(word in text for word in (*synonyms.CHINESE_SHAPES[combination.shape], combination.shape))
        assert any(word in text for word in synonyms.CHINESE_BACKGROUNDS["dark"])
        acts = synonyms.CHINESE_STILL if combination.motion == "still" else synonyms.CHINESE_TOWARDS[combination.motion]
        assert any(word in text for word in acts)


def test_plain_captions():
    circle = Combination("red", "circle", "right")
    assert plain_caption(circle) == "a red circle moving right"
    assert plain_caption(circle, "dark") == "a red circle moving right on a dark background"
    assert plain_caption(Combination("blue", "square", "still"), None) == "a blue square standing still"
    assert plain_caption(Combination("blue", "square", "up and down")) == "a blue square bouncing up and down"


def test_caption_is_deterministic():
    scene = sample_scene(np.random.default_rng(0), Combination("red", "circle", "up"))
    assert random_caption(scene, np.random.default_rng(3)) == random_caption(scene, np.random.default_rng(3))


def test_make_clips_writes_a_training_table(tmp_path: Path):
    table = make_clips(tmp_path / "clips", num=3, seed=5, workers=1)
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 3
    for i, row in enumerate(rows):
        scene, text, _ = make_scene(i, 5, "train")
        assert row["text"] == text
        assert (row["num_frames"], row["height"], row["width"], row["resolution"], row["fps"]) == (
            *("17", "64", "64", "4096"),
            "8",
        )
        assert Combination(row["color"], row["shape"], row["motion"]) not in HELD_OUT
        frames, fps = read_video(row["path"])
        assert fps == 8
        assert frames.shape == (17, SIZE, SIZE, 3)
        assert np.abs(frames.astype(int) - draw_clip(scene)).mean() < 4


def test_a_table_that_was_changed_stays(tmp_path: Path):
    table = make_clips(tmp_path / "clips", num=2, seed=5, workers=1)
    drawn = table.read_bytes()
    table.write_text("my captions")
    left = tmp_path / "clips" / "clips" / ".unfinished-abcdefgh.mp4"  # by a process that was killed
    left.touch()
    with pytest.raises(UserError, match="clips.csv exists and holds something else"):
        make_clips(tmp_path / "clips", num=2, seed=5, workers=1)
    assert table.read_text() == "my captions"
    assert not left.exists()
    make_clips(tmp_path / "clips", num=2, seed=5, workers=1, overwrite=True)
    assert table.read_bytes() == drawn


def test_one_program_at_a_time_in_a_folder(tmp_path: Path):
    make_clips(tmp_path / "clips", num=1, seed=5, workers=1)
    with claimed(tmp_path / "clips"), pytest.raises(UserError, match=r"is in use by process \d+ .*give another --out"):
        make_clips(tmp_path / "clips", num=1, seed=5, workers=1)
    with claimed(tmp_path / "new"), pytest.raises(UserError, match="is in use by"):
        make_clips(tmp_path / "new", num=1, seed=5, workers=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/deeper", "loop", "x" * 300])
def test_places_where_no_clips_can_be(tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="--out "):
        make_clips(tmp_path / place, num=1, seed=0, workers=1)


@pytest.mark.parametrize("recipe", ["{", "3", "\x00", '{"num": 1}'])
def test_a_damaged_recipe_is_no_recipe(tmp_path: Path, recipe: str):
    (tmp_path / "recipe.json").write_text(recipe)
    with pytest.raises(UserError, match=r"holds (no clips|clips of another recipe)"):
        make_clips(tmp_path, num=1, seed=0, workers=1)


@pytest.mark.parametrize("words", [{"num": 10**9}, {"workers": 10**5}, {"seed": 2**70}])
def test_numbers_have_bounds(tmp_path: Path, words: dict):
    with pytest.raises(UserError, match="it must be at most"):
        make_clips(tmp_path / "clips", **{"num": 1, "seed": 0, **words})


def test_make_clips_completes_but_never_overwrites(tmp_path: Path):
    out = tmp_path / "clips"
    table = make_clips(out, num=2, seed=5, workers=1)
    before = table.read_bytes()
    first = out / "clips" / "000000.mp4"
    (out / "clips" / "000001.mp4").unlink()
    stamp = first.stat().st_mtime_ns
    assert make_clips(out, num=2, seed=5, workers=1).read_bytes() == before
    assert first.stat().st_mtime_ns == stamp
    assert (out / "clips" / "000001.mp4").exists()
    with pytest.raises(UserError, match="another recipe"):
        make_clips(out, num=2, seed=6, workers=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no clips"):
        make_clips(other, num=2, seed=5, workers=1)
    with pytest.raises(UserError, match="--num"):
        make_clips(tmp_path / "none", num=0, seed=5)
    assert not (tmp_path / "none").exists()
