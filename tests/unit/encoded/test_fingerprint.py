"""What identifies the encoders of a cache."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from opensora.encoded.fingerprint import text_fingerprint
from opensora.models.text.config import TextEmbedderConfig
from opensora.utils import hub
from opensora.utils.errors import UserError


def fingerprint():
    t5, clip = (
        TextEmbedderConfig(type="text_embedder", from_pretrained=f"org/{name}", max_length=8) for name in ("t5", "clip")
    )
    return text_fingerprint(t5, clip, torch.float32)


@pytest.mark.parametrize("offline", [False, True])
def test_text_encoders_of_the_hub_are_known_by_their_commit(monkeypatch, offline, tmp_path):
    monkeypatch.setattr(hub, "is_reachable", lambda: not offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo: SimpleNamespace(sha="c0ffee"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(tmp_path / "c0ffee"))
    found = fingerprint()
    assert found["t5.from_pretrained"] == "weights org/t5@c0ffee"
    assert found["clip.from_pretrained"] == "weights org/clip@c0ffee"


def test_text_encoders_that_nobody_has(monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"org/t5 was not downloaded before.*hf download org/t5"):
        fingerprint()
