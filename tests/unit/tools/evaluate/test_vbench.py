"""The steps of tools/evaluate/vbench.py, with scorers that stand in for VBench's."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from opensora.utils.errors import UserError
from tools.evaluate.vbench import main
from tools.evaluate.vbench_steps import link_videos, part, read_prompts, shard

STANDIN = Path(__file__).parents[3] / "helpers" / "vbench_standin"
ENTRIES = [
    {"prompt_en": "a bird, " + "very " * 38 + "small", "dimension": ["color"]},  # as long as VBench's longest
    {"prompt_en": "alley.", "dimension": ["scene", "background_consistency"]},
]


@pytest.fixture
def work(tmp_path):
    """A prepared evaluation of two prompts, with an environment and a cache in which nothing is real."""
    (tmp_path / "info.json").write_text(json.dumps(ENTRIES))
    main(["prepare", "--work", str(tmp_path / "w"), "--info", str(tmp_path / "info.json")])
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={STANDIN} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    for name in ("grit_model/grit_b_densecap_objectdet.pth", "caption_model/tag2text_swin_14m.pth"):
        (tmp_path / "cache" / name).parent.mkdir(parents=True)
        (tmp_path / "cache" / name).touch()
    (tmp_path / "cache/huggingface/hub/models--bert-base-uncased").mkdir(parents=True)
    (tmp_path / "cache/clip_model").mkdir()
    (tmp_path / "cache/clip_model/ViT-B-32.pt").touch()
    return tmp_path / "w"


def make_videos(work: Path, leave_out: int = 0) -> None:
    """What generation leaves: videos under short names, with notes beside them."""
    made = work / "samples" / "video_256px"
    made.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(work / "prompts.csv")
    for name in rows["name"][: len(rows) - leave_out]:
        (made / f"{name}.mp4").write_text(name)
        (made / f"{name}.json").touch()
    (work / "made_in.txt").write_text("samples/video_256px\n")


def score(work: Path, *more: str) -> None:
    places = {name: str(work.parent / name) for name in ("env", "cache")}
    main(["score", "--work", str(work), "--env", places["env"], "--cache", places["cache"], "--device", "cpu", *more])


def test_prepared_files(work):
    rows = pd.read_csv(work / "prompts.csv")
    assert len(rows) == 10
    assert json.loads((work / "info.json").read_text()) == ENTRIES
    assert (work / "dimensions" / "scene.txt").read_text() == "alley.\n"
    main(["prepare", "--work", str(work), "--info", str(work.parent / "info.json")])  # again does no harm
    with pytest.raises(UserError, match="prepared with another seed"):
        main(["prepare", "--work", str(work), "--info", str(work.parent / "info.json"), "--seed", "7"])
    (work / "settings.json").write_text("[")
    with pytest.raises(UserError, match="settings.json is damaged"):
        main(["prepare", "--work", str(work), "--info", str(work.parent / "info.json")])


def test_from_videos_to_a_table(work, capsys, monkeypatch):
    make_videos(work, leave_out=1)
    with pytest.raises(UserError, match="1 of 10 videos are missing"):
        score(work)
    make_videos(work)
    monkeypatch.setenv("STANDIN_FAILS", "1")
    with pytest.raises(UserError, match=r"1 of 3 scorers failed(?s:.*)scene \(status 1\): NotImplementedError"):
        score(work, "--gpus", "0", "1")
    monkeypatch.delenv("STANDIN_FAILS")
    before = (work / "scores" / "color_eval_results.json").stat().st_mtime_ns
    score(work)
    assert (work / "scores" / "color_eval_results.json").stat().st_mtime_ns == before  # only what was left
    names = {path.name for path in (work / "videos").iterdir()}
    assert "alley.-4.mp4" in names
    assert len(names) == 10
    assert all(name.endswith(".mp4") for name in names)
    found = json.loads((work / "scores" / "color_eval_results.json").read_text())["color"]
    assert found[0] == pytest.approx((len(ENTRIES[0]["prompt_en"]) + 6) / 100)
    assert len(found[1]) == 5
    capsys.readouterr()
    main(["table", str(work)])
    text = capsys.readouterr().out
    assert "HunyuanVideo" in text
    assert "2 of 944 prompts: not comparable" in text
    table = pd.read_csv(work / "table.csv")
    assert table["scene"][0] == pytest.approx(0.12)
    assert table["total"].isna()[0]


def test_models_and_environment_must_be_there(work):
    make_videos(work)
    (work.parent / "cache/clip_model/ViT-B-32.pt").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the files(?s:.*)curl -L -o .*ViT-B-32.pt"):
        score(work)
    with pytest.raises(UserError, match="environment --env"):
        main(
            [
                "score",
                "--work",
                str(work),
                "--env",
                "nowhere",
                "--dimensions",
                "color",
                "--cache",
                str(work.parent / "cache"),
            ]
        )


def test_pictures_of_image_to_video(tmp_path, work):
    images = tmp_path / "1-1"
    images.mkdir()
    (images / "sea.jpg").touch()
    info = [{"prompt_en": "sea", "dimension": ["i2v_background"], "image_name": "sea.jpg"}]
    (tmp_path / "i2v.json").write_text(json.dumps(info))
    other = tmp_path / "other"
    flags = ["--work", str(other), "--suite", "i2v", "--info", str(tmp_path / "i2v.json")]
    with pytest.raises(UserError, match="--images"):
        main(["prepare", *flags])
    main(["prepare", *flags, "--images", str(images)])
    make_videos(other)
    (tmp_path / "cache/dreamsim/dino_vitb16_lora").mkdir(parents=True)
    score(other)
    main(["table", str(other)])
    with pytest.raises(UserError, match="make a table of each"):
        main(["table", str(other), str(work)])


def test_shards_are_all_rows_once():
    assert [row for k in range(1, 8) for row in part(20, (k, 7))] == list(range(20))
    for text in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(UserError, match="--shard"):
            shard(text)


def test_a_video_stays_until_its_successor_is_there(work, monkeypatch):
    make_videos(work)
    rows = read_prompts(work)
    assert link_videos(work, rows) == 10
    first = work / "videos" / rows["file"][0]
    (again := work / "samples" / "video_256px" / f"{rows['name'][0]}.mp4").unlink()
    again.write_text("made again")

    def refuse(*places):
        raise OSError(errno.ENOSPC, "No space left on device", str(places[-1]))

    with monkeypatch.context() as full:
        full.setattr(Path, "hardlink_to", refuse)
        full.setattr(shutil, "copyfile", refuse)
        with pytest.raises(OSError, match="No space"):
            link_videos(work, rows)
    assert first.read_text() == rows["name"][0]
    link_videos(work, rows)
    assert first.read_text() == "made again"
    assert len(list((work / "videos").iterdir())) == 10


def test_videos_are_made_in_parts(tiny_config_file, work, monkeypatch):
    """Through the same code as inference.py; a part that was made already is left alone."""
    shards = ["generate", str(tiny_config_file), "--work", str(work), "--num_steps", "1", "--num_frames", "1"]
    with pytest.raises(UserError, match="no videos yet"):
        score(work)
    asked = []
    monkeypatch.setattr(
        "opensora.generation.run.generate", lambda cfg, *_: asked.append((cfg.start_index, cfg.end_index))
    )
    main([*shards, "--shard", "1/3"])
    main([*shards, "--shard", "3/3"])
    assert asked == [(0, 3), (6, 10)]
