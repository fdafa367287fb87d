"""Timings of checkpoints."""

import pytest
import torch

from opensora.training.checkpoint.writer import CheckpointWriter
from opensora.utils.errors import UserError
from tools.benchmark.checkpoints import stand_still


@pytest.mark.parametrize("beside", [False, True])
def test_a_checkpoint_that_cannot_be_written_has_no_time(tmp_path, beside):
    writer = CheckpointWriter(tmp_path / "run", asynchronous=beside)
    stood, written = stand_still(writer, {"a": torch.zeros(2)}, 0)
    assert 0 < stood <= written
    (tmp_path / "run" / ".epoch0-global_step1.writing").write_text("in its way")
    with pytest.raises(UserError, match="epoch0-global_step1: a checkpoint could not be written"):
        stand_still(writer, {"a": torch.zeros(2)}, 1)
