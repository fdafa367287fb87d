"""What weights record of the conditions that they were trained on."""

import torch

from opensora.config.options import ModelOptions
from opensora.diffusion.trained import conditions_metadata, note_untrained, trained_conditions
from opensora.utils.weights_writing import save_safetensors


def test_weights_tell_their_conditions(tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    save_safetensors({"x": torch.zeros(1)}, path, conditions_metadata({"t2v": 2, "i2v_head": 1, "frames": 0}))
    section = ModelOptions(type="flux", from_pretrained=str(path))
    assert trained_conditions(section) == ["i2v_head", "t2v"]
    note_untrained(section, ["t2v", "i2v_head"])
    assert not caplog.records
    note_untrained(section, ["frames"])
    assert "cond_type frames: these weights were trained on i2v_head, t2v; " in caplog.text
    save_safetensors({"x": torch.zeros(1)}, path, conditions_metadata(None))
    assert trained_conditions(section) is None  # as the released weights
    assert trained_conditions(None) is None
