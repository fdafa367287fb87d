"""Where prompts come from."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.generation.jobs import job_seed
from opensora.generation.requests import read_requests
from opensora.registry import DATASETS
from opensora.utils.errors import UserError
from opensora.utils.video import save_image


class Balls:
    """Prompts of the user's own, from no table."""

    data_path = "balls"

    def __init__(self, colours):
        self.colours = colours

    def __len__(self):
        return len(self.colours)

    def __getitem__(self, index):
        return {"text": f"a {self.colours[index]} ball" if self.colours[index] else "", "seed": index}


def test_prompts_of_a_registered_dataset(tiny_config, tmp_path):
    DATASETS.register_module("balls", module=Balls)
    try:
        section = {"type": "balls", "colours": ["red", "green", "blue", ""]}
        cfg = load_config({**tiny_config, "dataset": section, "start_index": 1, "end_index": 3}, InferenceOptions)
        requests = read_requests(cfg, tmp_path)
        assert [(r.text, r.index, r.seed) for r in requests] == [("a green ball", 1, 1), ("a blue ball", 2, 2)]
        cfg = load_config({**tiny_config, "dataset": section}, InferenceOptions)
        with pytest.raises(UserError, match="balls, row 5: column 'text' is empty"):
            read_requests(cfg, tmp_path)
    finally:
        DATASETS.module_dict.pop("balls")


@pytest.mark.parametrize("seed", [0, 12345678, 2**53 + 1, 2**63 - 1])
def test_seeds_keep_all_digits(tiny_config, tmp_path, seed):
    """Whatever kind of table they come from, also where other rows have none."""
    pq.write_table(pa.table({"text": ["a", "b"], "seed": pa.array([seed, None], pa.int64())}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text(f"text,seed\na,{seed}\nb,\n")
    for name in ("t.parquet", "t.csv"):
        section = {"type": "text", "data_path": str(tmp_path / name)}
        requests = read_requests(load_config({**tiny_config, "dataset": section}, InferenceOptions), tmp_path)
        assert [request.seed for request in requests] == [seed, tiny_config["sampling_option"].get("seed")]
        assert job_seed(0, requests[0], 3) == (seed + 3) % 2**63


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1.5", "inf", "nan"])
def test_what_is_no_seed(tiny_config, tmp_path, seed):
    (tmp_path / "t.csv").write_text(f"text,seed\na,1\nb,{seed}\n")
    section = {"type": "text", "data_path": str(tmp_path / "t.csv")}
    with pytest.raises(UserError, match=r"t\.csv, row 3: seed .*must be a whole number from 0"):
        read_requests(load_config({**tiny_config, "dataset": section}, InferenceOptions), tmp_path)


def test_a_reference_needs_a_condition(tiny_config, tmp_path):
    """On the command line, in a table and in Python (tests of the pipeline) alike."""
    cfg = load_config({**tiny_config, "prompt": "a", "ref": "up.png"}, InferenceOptions)
    with pytest.raises(UserError, match="--ref is given but cond_type is t2v; --cond_type i2v_head"):
        read_requests(cfg, tmp_path)
    (tmp_path / "t.csv").write_text("text,ref,cond_type\na,,\nb,up.png,t2v\n")
    section = {"type": "text", "data_path": str(tmp_path / "t.csv")}
    with pytest.raises(UserError, match=r"t\.csv, row 3: ref is given but cond_type is t2v"):
        read_requests(load_config({**tiny_config, "dataset": section}, InferenceOptions), tmp_path)


def test_a_picture_of_the_users_own_takes_the_place_of_a_drawn_one(tiny_config, tmp_path):
    save_image(np.zeros((8, 8, 3), np.uint8), tmp_path / "up.png")
    (tmp_path / "t.csv").write_text("text,ref\na,\nb,up.png\n")
    section = {"type": "text", "data_path": str(tmp_path / "t.csv")}
    cfg = load_config({**tiny_config, "dataset": section, "use_t2i2v": True}, InferenceOptions)
    requests = read_requests(cfg, tmp_path)
    assert [(request.cond_type, len(request.refs)) for request in requests] == [("i2v_head", 0), ("i2v_head", 1)]


def test_a_book_is_no_prompt(tiny_config, tmp_path):
    (tmp_path / "t.csv").write_text(f"text,neg\na,b\na,{'x' * 200_000}\n")
    section = {"type": "text", "data_path": str(tmp_path / "t.csv")}
    with pytest.raises(UserError, match=r"row 3: neg: a text of 200,000 letters; a prompt has at most 100,000"):
        read_requests(load_config({**tiny_config, "dataset": section}, InferenceOptions), tmp_path)
    with pytest.raises(UserError, match="--prompt: a text of 20,000,000 letters"):
        read_requests(load_config({**tiny_config, "prompt": "x" * 20_000_000}, InferenceOptions), tmp_path)


def test_nothing_to_make(tiny_config, tmp_path):
    with pytest.raises(UserError, match="nothing to make: give --prompt"):
        read_requests(load_config(tiny_config, InferenceOptions), tmp_path)
