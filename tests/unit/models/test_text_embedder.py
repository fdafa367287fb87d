"""Text encoders: folders that are not whole, wrong lengths, and hub ids without a network."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from opensora.generation import refine
from opensora.models.text import HFEmbedder
from opensora.utils import hub
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tools.data.stages import caption

NAMES = {"t5": "google/t5-demo", "clip": "openai/clip-demo"}


@pytest.fixture
def folder(tmp_path):
    """Makes a copy of a shipped encoder."""

    def copy(kind):
        return shutil.copytree(ROOT / "assets/demo" / NAMES[kind], tmp_path / kind)

    return copy


@pytest.mark.parametrize(("kind", "file"), [("t5", "spiece.model"), ("clip", "vocab.json"), ("clip", "merges.txt")])
def test_a_folder_without_its_vocabulary_is_refused(folder, kind, file):
    path = folder(kind)
    (path / file).unlink()
    with pytest.raises(UserError, match=f"its tokenizer lacks {file}$"):
        HFEmbedder(str(path), 16)


def test_a_clip_folder_without_any_vocabulary_is_refused(folder):
    path = folder("clip")
    for name in ("vocab.json", "merges.txt"):
        (path / name).unlink()
    with pytest.raises(UserError, match=r"its tokenizer lacks vocab.json, merges.txt"):
        HFEmbedder(str(path), 16)


@pytest.mark.parametrize("kind", list(NAMES))
def test_weights_are_never_drawn_at_random(folder, kind):
    path = folder(kind)
    state = load_file(path / "model.safetensors")
    lost = next(key for key in state if key.endswith("0.layer_norm.weight" if kind == "t5" else "layer_norm2.weight"))
    tensor = state.pop(lost)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="its weights lack .*" + lost.removeprefix("text_model.")):
        HFEmbedder(str(path), 16)
    save_file({**state, lost: tensor[:-1].clone()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="Cannot load the text encoder"):
        HFEmbedder(str(path), 16)


def test_a_truncated_file_is_one_line(folder):
    path = folder("t5")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"Cannot load the text encoder {path}: .*not fully covered"):
        HFEmbedder(str(path), 16)


@pytest.mark.parametrize(("kind", "length", "said"), [("t5", 0, "at least 1"), ("clip", 78, "takes 77 at most")])
def test_lengths_that_an_encoder_cannot_take(folder, kind, length, said):
    with pytest.raises(UserError, match=f"max_length={length}.* {said}"):
        HFEmbedder(str(folder(kind)), length)


def test_a_folder_below_home(folder, tmp_path, monkeypatch):
    folder("t5")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HFEmbedder("~/t5", 16)(["a red circle"]).shape[:2] == (1, 16)


def test_a_hub_id_without_a_network_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"hf download org/t5-tiny --local-dir org/t5-tiny$"):
        HFEmbedder("org/t5-tiny", 16, cache_dir=str(tmp_path))


def test_language_models_ask_the_hub_once_too(monkeypatch):
    """Without a network, one that is not in the cache is refused at once."""
    asked = []
    monkeypatch.setattr(hub, "is_reachable", lambda: asked.append(1))
    for load in (lambda: refine.LocalModel("org/absent"), lambda: caption.LocalModel("org/absent", "cpu", 1)):
        with pytest.raises(UserError, match=r"org/absent: cannot be loaded"):
            load()
    assert len(asked) == 2
