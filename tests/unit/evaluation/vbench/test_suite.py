"""Lists of prompts as VBench has them, and the tables made of them."""

import json

import pytest

from opensora.evaluation.vbench.models import FILES, check_models
from opensora.evaluation.vbench.scores import I2V, T2V
from opensora.evaluation.vbench.suite import (
    check_images,
    choose,
    dimension_lists,
    find_info,
    prompt_table,
    read_entries,
    read_suite,
)
from opensora.utils.errors import UserError

ENTRIES = [
    {"prompt_en": "a bird", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "bird"}}},
    {"prompt_en": "alley", "dimension": ["scene", "background_consistency"]},
    {"prompt_en": "a bird", "dimension": ["color"]},
    {"prompt_en": "barn", "dimension": ["scene"]},
]


def test_a_prompt_that_is_listed_twice_is_made_once():
    prompts = read_suite(ENTRIES)
    assert [(p.index, p.text) for p in prompts] == [(0, "a bird"), (1, "alley"), (3, "barn")]
    assert prompts[0].dimensions == ("object_class", "color")
    assert dimension_lists(prompts)["scene"] == ["alley", "barn"]


def test_rows_have_names_and_seeds_of_their_own():
    table = prompt_table(read_suite(ENTRIES), samples=5, seed=42, refined={"barn": {"refined": "a red barn"}})
    assert len(table) == 15
    assert table["seed"].is_unique
    assert table["name"].is_unique
    assert list(table["text"][:3]) == ["a bird", "alley", "barn"]  # all once before any again
    last = table.iloc[-1]
    assert (last["file"], last["seed"], last["refined"]) == ("barn-4.mp4", 42 + 304, "a red barn")
    small = prompt_table(choose(read_suite(ENTRIES), ["scene"]), samples=1, seed=42)
    assert set(small["seed"]) <= set(table["seed"])  # a subset has the same videos


def test_a_subset_is_spread_over_the_dimensions():
    entries = [{"prompt_en": f"{name} {i}", "dimension": [name]} for name in "abc" for i in range(5)]
    chosen = choose(read_suite(entries), limit=4)
    assert [p.text for p in chosen] == ["a 0", "a 1", "b 0", "c 0"]
    with pytest.raises(UserError, match="--dimensions d: this suite has a, b, c"):
        choose(read_suite(entries), ["d"])


def test_where_the_list_is_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"VBench_full_info.json.*git clone"):
        find_info("t2v", [tmp_path])
    inside = tmp_path / "lib" / "python3.10" / "site-packages" / "vbench" / "VBench_full_info.json"
    inside.parent.mkdir(parents=True)
    inside.write_text(json.dumps(ENTRIES))
    assert find_info("t2v", [tmp_path]) == find_info("t2v", [inside]) == inside
    assert read_entries(inside) == ENTRIES


@pytest.mark.parametrize("text", ["{", "{}", "[]", '[{"prompt_en": "a"}]', '[{"prompt_en": "a/b", "dimension": []}]'])
def test_a_damaged_list(tmp_path, text):
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(UserError, match=r"info.json"):
        read_entries(tmp_path / "info.json")


def test_missing_pictures(tmp_path):
    prompts = read_suite([{"prompt_en": "a sea", "dimension": ["i2v_background"], "image_name": "a sea.jpg"}])
    with pytest.raises(UserError, match=r"a sea.jpg missing; .*download_data.sh"):
        check_images(prompts, tmp_path)
    (tmp_path / "a sea.jpg").touch()
    check_images(prompts, tmp_path)
    row = prompt_table(prompts, 1, 0, tmp_path).iloc[0]
    assert (row["ref"], row["cond_type"]) == (str(tmp_path / "a sea.jpg"), "i2v_head")


def test_files_of_the_scorers(tmp_path):
    known = {*T2V.dimensions, *I2V.dimensions}
    assert {name for file in FILES for name in file.dimensions} <= known
    check_models(tmp_path, ["temporal_flickering"])  # needs none
    with pytest.raises(UserError, match=r"lacks 2 .*(?s:.*)ViClip-InternVid-10M-FLT.pth"):
        check_models(tmp_path, ["temporal_style"])
