"""Two settings compared: pairs, intervals, the tables and the page."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from opensora.utils.errors import UserError
from opensora.utils.video import save_video
from tests.unit.tools.evaluate.test_measures import pan
from tools.evaluate.compare import main, seeded_table
from tools.evaluate.intervals import mean_interval, win_rate
from tools.evaluate.pairs import compare, make_pairs, measure_pairs
from tools.evaluate.samples import Sample, list_samples


def side(folder: Path, noise: float, names: str = "abcd") -> Path:
    """A folder as inference.py leaves it: one clip per prompt, with more or less noise in it."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(names):
        clip = np.clip(pan((index + 1) * np.arange(5)) + rng.normal(0, noise, (5, 48, 64, 3)), 0, 255)
        save_video(clip.astype(np.uint8), folder / f"{name}.mp4", 8, crf=10)
        record = {"prompt": f"prompt {name}", "seed": index, "seconds": {"steps": 2.0 + noise / 10 + index / 100}}
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_two_folders(tmp_path, capsys):
    first, second = side(tmp_path / "plain", 0), side(tmp_path / "noisy", 20, "abcde")
    out = tmp_path / "out"
    main([str(first), str(second), "--out", str(out)])
    rows = pd.read_csv(out / "pairs.csv", dtype={"pair": str})
    assert list(rows["prompt"]) == [f"prompt {name}" for name in "abcd"]
    assert rows["psnr"].between(15, 30).all()
    found = pd.read_csv(out / "comparison.csv").set_index("measure")
    assert found["sure"]["flicker"] == "worse"
    assert found["sure"]["seconds"] == "worse"
    assert found["difference"]["seconds"] == pytest.approx(2)
    assert found["low"]["flicker"] < found["difference"]["flicker"] < found["high"]["flicker"]
    assert "sure" in (out / "comparison.html").read_text()
    assert "1 without their like in the other folder: e" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        main([str(first), str(second), "--out", str(out)])


def test_a_setting_and_itself(tmp_path):
    folder = list_samples(side(tmp_path / "plain", 0, "ab"))
    found = compare(measure_pairs(make_pairs(folder, folder)[0])).set_index("measure")
    assert set(found["sure"]) == {""}
    assert found["difference"]["ssim between the two"] == 1
    assert found["difference"]["psnr between the two"] == 99


def test_videos_of_other_seeds_are_no_pair():
    first = [Sample(Path("x/a.mp4"), "a", {"prompt": "a cat", "seed": 1})]
    with pytest.raises(UserError, match="other prompts or seeds"):
        make_pairs(first, [Sample(Path("y/a.mp4"), "a", {"prompt": "a cat", "seed": 2})])
    with pytest.raises(UserError, match="no video"):
        make_pairs(first, [Sample(Path("y/b.mp4"), "b")])
    plain = [Sample(Path("x/a.mp4"), "a")]
    assert len(make_pairs(plain, [Sample(Path("y/a.mp4"), "a")])[0]) == 1  # files of others go by their names


def test_settings_are_made_of_the_same_prompts_and_seeds(tmp_path, monkeypatch, tiny_config_file):
    (tmp_path / "p.csv").write_text('text,seed\n"rain, sea",\nsnow,7\n')
    with pytest.raises(UserError, match="a config needs --prompts"):
        main([str(tiny_config_file), f"{tiny_config_file} --num_steps 2", "--out", str(tmp_path / "out")])
    table = pd.read_csv(seeded_table(tmp_path / "p.csv", 2, tmp_path / "out"))
    assert list(table["seed"]) == [42, 43, 7, 8]
    made = {}

    def generate(cfg, device, environment):
        side(Path(cfg.save_dir) / "video_32px", 5 * cfg.sampling_option.num_steps, "ab")
        made[Path(cfg.save_dir).name] = (cfg.sampling_option.num_steps, cfg.dataset.data_path)

    monkeypatch.setattr("opensora.generation.run.generate", generate)
    words = [str(tiny_config_file), f"{tiny_config_file} --num_steps 2", "--out", str(tmp_path / "out")]
    main([*words, "--prompts", str(tmp_path / "p.csv")])
    assert made == {side: (steps, str(tmp_path / "out" / "prompts.csv")) for side, steps in (("a", 4), ("b", 2))}
    words[1] += "0"
    with pytest.raises(UserError, match="was made by"):
        main([*words, "--prompts", str(tmp_path / "p.csv"), "--overwrite"])


@pytest.mark.parametrize(
    ("words", "seed", "said"),
    [
        ("--num_stepss 3", "7", "--num_stepss is not a known key"),
        ("--prompt 'a", "7", "not a command line .*No closing quotation"),
        ("--num_steps 3", "x", r"p.csv, row 2: seed 'x' is not a number"),
        ("--num_steps 3", "9" * 5000, r"p.csv, row 2: seed '9+' is not a number"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, tiny_config_file, words, seed, said):
    (tmp_path / "p.csv").write_text(f"text,seed\nsnow,{seed}\n")
    given = [str(tiny_config_file), f"{tiny_config_file} {words}", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=said):
        main([*given, "--prompts", str(tmp_path / "p.csv")])
    assert not (tmp_path / "out").exists()


def test_intervals_hold_the_true_mean():
    """In about 95 of 100 experiments; fewer samples, wider intervals."""
    rng = np.random.default_rng(1)
    hits, widths = 0, {20: [], 80: []}
    for _ in range(40):
        for size, found in widths.items():
            interval = mean_interval(rng.normal(1, 2, size))
            hits += interval.low < 1 < interval.high
            found.append(interval.high - interval.low)
    assert 70 <= hits <= 80
    assert np.mean(widths[20]) / np.mean(widths[80]) == pytest.approx(2, rel=0.15)
    assert mean_interval([3.0, 3.0, 3.0]).low == 3
    assert np.isnan(mean_interval([3.0]).low)


def test_win_rates():
    even = win_rate([(str(i), float(i % 2)) for i in range(40)])
    assert even.rate.mean == 0.5
    assert even.rate.low < 0.4 < 0.6 < even.rate.high
    assert even.p == 1
    sure = win_rate([(str(i), 1.0) for i in range(12)])
    assert (sure.wins, sure.losses, sure.ties) == (12, 0, 0)
    assert 0.7 < sure.rate.low < sure.rate.high == 1  # twelve of twelve may be luck
    assert sure.p < 0.001
    many = win_rate([("0", 1.0)] * 50 + [("1", 0.0)] * 50)  # a hundred votes on two pairs say little
    assert many.p == 1


def test_prompts_of_samples_that_are_there_stay(tmp_path):
    for name, text in (("p.csv", "rain"), ("other.csv", "snow")):
        (tmp_path / name).write_text(f"text\n{text}\n")
    out = tmp_path / "out"
    made = seeded_table(tmp_path / "p.csv", 1, out)
    (out / "a").mkdir()
    before = made.read_bytes()
    seeded_table(tmp_path / "p.csv", 1, out)  # the same again
    with pytest.raises(UserError, match="holds other prompts, whose samples are in a; give another --out"):
        seeded_table(tmp_path / "other.csv", 1, out)
    with pytest.raises(UserError, match="is the input"):
        seeded_table(made, 1, out)
    assert made.read_bytes() == before
