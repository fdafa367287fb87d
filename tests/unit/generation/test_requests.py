"""Where prompts come from."""

import pytest

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.generation.requests import read_requests
from opensora.registry import DATASETS
from opensora.utils.errors import UserError


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


def test_nothing_to_make(tiny_config, tmp_path):
    with pytest.raises(UserError, match="nothing to make: give --prompt"):
        read_requests(load_config(tiny_config, InferenceOptions), tmp_path)
