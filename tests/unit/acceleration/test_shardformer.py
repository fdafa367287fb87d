"""ColossalAI's operations in the T5 encoder, where they cannot be used: results are the same and one line says so.

Where they can: `tests.parallel.checks_colossal`.
"""

import logging
import sys

import pytest
import torch

from opensora.acceleration import shardformer
from opensora.acceleration.shardformer import use_shardformer
from opensora.models.text.embedder import HFEmbedder
from tests.conftest import text_encoder


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("opensora"), "propagate", True)
    caplog.set_level("INFO", logger="opensora")
    return lambda: [record.message for record in caplog.records if "shardformer" in record.message]


def embedder(**options):
    return HFEmbedder(text_encoder("google/t5-demo", "d_model")[0], max_length=16, **options)


def test_without_colossalai_it_stays_plain(lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "colossalai", None)
    monkeypatch.setitem(sys.modules, "colossalai.shardformer", None)
    encoder = embedder(shardformer=True)
    plain = encoder.model
    assert not use_shardformer(encoder)
    assert encoder.model is plain
    assert len(lines()) == 1
    assert "plain transformers" in lines()[0]


def test_other_results_are_not_taken(lines, monkeypatch):
    encoder = embedder(shardformer=True)
    plain, other = encoder.model, embedder().model
    with torch.no_grad():
        other.encoder.final_layer_norm.weight.mul_(1.01)
    monkeypatch.setattr(shardformer, "_replaced", lambda model, is_clip: other)
    assert not use_shardformer(encoder)
    assert encoder.model is plain
    assert "differs by 1.0e-02" in lines()[0]


def test_only_on_request(lines):
    assert not use_shardformer(embedder())
    assert not use_shardformer(torch.nn.Linear(1, 1))
    assert lines() == []
