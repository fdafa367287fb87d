"""Text encoders: folders that are not whole, wrong lengths, and hub ids without a network."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.generation import refine
from opensora.models.text import HFEmbedder
from opensora.models.text.fitting import count_notes
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


LONG = "a red circle moving right, " * 9


@pytest.fixture(scope="module")
def encoders():
    """The shipped ones, at the lengths of the demo's configs."""
    return {kind: HFEmbedder(str(ROOT / "assets/demo" / NAMES[kind]), n) for kind, n in (("t5", 24), ("clip", 77))}


def words(embedder, text):
    return embedder.tokenizer.decode(embedder.tokenize([text])[0], skip_special_tokens=True)


@pytest.mark.parametrize("end", ["8 FPS. 4 motion score.", "8 FPS, 4 motion score.", "29.97 FPS.", "4 motion score."])
def test_what_is_appended_stays_where_t5_cuts(encoders, end, caplog):
    t5 = encoders["t5"]
    for _ in range(2):
        found = words(t5, f"{LONG.strip(' ,')}. {end}")
        assert found.endswith(end.lower())
        assert found.startswith("a red circle moving right")
        assert len(t5.tokenize([LONG + end])[0]) == 24
    assert len([record for record in caplog.records if f"tokens are lost, from before '{end}'" in record.message]) == 2


def test_texts_that_fit_or_have_no_end_are_as_the_tokenizer_makes_them(encoders):
    for kind, embedder in encoders.items():
        plain = {"truncation": True, "padding": "max_length", "max_length": embedder.max_length, "return_tensors": "pt"}
        for text in ("a red circle. 8 FPS. 4 motion score.", "", LONG, *((LONG + "8 FPS.",) if kind == "clip" else ())):
            assert torch.equal(embedder.tokenize([text]), embedder.tokenizer([text.strip()], **plain)["input_ids"])
    short = HFEmbedder(str(ROOT / "assets/demo" / NAMES["t5"]), 6)
    text = "a red circle moving right. 8 FPS. 4 motion score."
    assert words(short, text) == "a red circle moving right", "an end takes half of the room at most"
    off = HFEmbedder(str(ROOT / "assets/demo" / NAMES["t5"]), 24, keep_suffix=False)
    assert "fps" not in words(off, LONG + "8 FPS.")


def test_lost_tokens_and_unknown_words_are_said_once_per_text(encoders, caplog):
    t5 = HFEmbedder(str(ROOT / "assets/demo" / NAMES["t5"]), 24)
    for _ in range(2):
        t5.tokenize(["a красный circle 😀", "a red circle", LONG])
        encoders["clip"].tokenize(["a красный circle 😀"])
    first, second = [record.message for record in caplog.records]
    assert "T5: texts have words that the tokenizer does not know and drops: красный, 😀 (" in first
    tokens = len(t5.tokenizer(LONG)["input_ids"])
    assert f"T5: texts are cut to 24 tokens: the last {tokens - 24} of {tokens} tokens are lost" in second


def test_many_texts_are_counted(caplog):
    t5 = HFEmbedder(str(ROOT / "assets/demo" / NAMES["t5"]), 24)
    count_notes(t5, object())
    for number in range(25):
        t5.tokenize([f"{number} {LONG}"] * 2)
    first, second = [record.message for record in caplog.records]
    assert "further ones are counted" in first
    assert second.endswith("texts are cut to 24 tokens: 10 so far")


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
