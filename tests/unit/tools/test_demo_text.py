"""The demo's text encoders: wordings they are trained on, and the shipped folders."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from opensora.models.text.embedder import HFEmbedder
from opensora.utils.errors import UserError
from tools.demo.text_tokenizers import train_clip_tokenizer, train_t5_tokenizer
from tools.demo.train_text import (
    CLIP_FOLDER,
    CLIP_LENGTH,
    T5_FOLDER,
    T5_LENGTH,
    Heads,
    clip_caption,
    targets,
    train_text,
    training_example,
)
from tools.demo.wordings import Attributes, sample_attributes, tidy, unseen_caption, wide_caption
from tools.demo.world import HELD_OUT, Combination, combinations

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def t5() -> HFEmbedder:
    return HFEmbedder(str(ROOT / "assets/demo" / T5_FOLDER), max_length=T5_LENGTH)


@pytest.fixture(scope="module")
def clip() -> HFEmbedder:
    return HFEmbedder(str(ROOT / "assets/demo" / CLIP_FOLDER), max_length=CLIP_LENGTH)


def test_training_never_shows_a_held_out_combination():
    rng = np.random.default_rng(0)
    for _ in range(500):
        attributes = training_example(rng).attributes
        assert Combination(*attributes[:3]) not in HELD_OUT


def test_wordings_say_their_attributes_and_no_others():
    rng = np.random.default_rng(1)
    for _ in range(300):
        attributes = sample_attributes(rng, combinations("all"), missing=0.3)
        text = wide_caption(attributes, rng).lower()
        for value in (attributes.color, attributes.shape, attributes.background):
            assert value is None or value in text
        if attributes.background is None:
            assert "dark" not in text
            assert "light" not in text
        assert "  " not in text
        assert "None" not in text
    full = Attributes("red", "circle", "left", "dark")
    assert all(word in unseen_caption(full, rng) for word in ("red", "circle", "left", "dark"))


def test_tidy_drops_what_left_out_parts_leave():
    assert tidy("  a red circle  , moving left , ") == "a red circle, moving left"


def test_targets_have_a_class_for_the_unsaid():
    rng = np.random.default_rng(2)
    example = clip_caption(rng, "train")._replace(attributes=Attributes("red", None, "still", None))
    assert targets([example]).tolist() == [[0, 3, 4, 2]]
    assert [logits.shape[-1] for logits in Heads(8)(torch.zeros(1, 8))] == [7, 4, 8, 3]


def test_tokenizers_are_reproducible_and_take_any_text(tmp_path: Path):
    from transformers import CLIPTokenizer, T5Tokenizer

    rng = np.random.default_rng(3)
    texts = [training_example(rng).text for _ in range(600)]
    for name, train in (("t5", train_t5_tokenizer), ("clip", train_clip_tokenizer)):
        sizes = []
        for folder in (tmp_path / name / "a", tmp_path / name / "b"):
            folder.mkdir(parents=True)
            sizes.append(train(texts, folder))
        for file in (tmp_path / name / "a").iterdir():
            assert file.read_bytes() == (tmp_path / name / "b" / file.name).read_bytes()
        folder = str(tmp_path / name / "a")
        tokenizer = CLIPTokenizer.from_pretrained(folder) if name == "clip" else T5Tokenizer.from_pretrained(folder)
        assert len(tokenizer) == sizes[0] == sizes[1]
        assert max(tokenizer("Größe 日本 🙂 zebra's 12!").input_ids) < sizes[0]
        assert "circle" in tokenizer.decode(tokenizer("a red circle").input_ids)


def test_shipped_captions_fit(t5: HFEmbedder, clip: HFEmbedder):
    rng = np.random.default_rng(4)
    texts = [clip_caption(rng, "train").text for _ in range(1000)]
    assert max(len(ids) for ids in t5.tokenizer(texts).input_ids) <= T5_LENGTH - 1
    assert max(len(ids) for ids in clip.tokenizer(texts).input_ids) <= CLIP_LENGTH


def test_shipped_embeddings_tell_attributes_apart(t5: HFEmbedder, clip: HFEmbedder):
    assert clip.is_clip
    assert not t5.is_clip
    words = ["red circle moving right", "blue circle moving right", "red square moving right", "red circle moving up"]
    same = ["the {} 8 FPS.", "one {}. 8 FPS."]
    for embedder, shape in ((t5, (T5_LENGTH, 64)), (clip, (64,))):
        states = embedder([form.format(w) for w in words for form in same])
        assert states.shape[1:] == shape
        assert 0.5 < states.std() < 2
        pooled = states.mean(1) if states.ndim == 3 else states
        distance = torch.cdist(pooled, pooled)
        for i in range(len(pooled)):
            twin = i ^ 1  # the same content in the other form
            others = [j for j in range(len(pooled)) if j // 2 != i // 2]
            assert distance[i, twin] < distance[i, others].min()


def test_shipped_encoders_know_other_words(t5: HFEmbedder, clip: HFEmbedder):
    """Everyday and Chinese wordings lie nearer to the plain caption of the same than to those of other things."""
    said = {
        "a red circle moving left": ("a RED BALL rolling slowly to the left", "一个红色的球向左移动"),
        "a blue square moving right": ("navy box flying right", "蓝色方块往右移动"),
        "a cyan triangle moving up": ("a turquoise pyramid going up", "青色三角形向上移动"),
        "a purple circle standing still": ("violet disc standing still", "紫色圆形静止不动"),
        "a yellow square moving down": ("A golden block floats down", "黄色的盒子向下移动"),
        "a green triangle moving left": ("emerald pyramid moves left", "绿色三角形朝左移动"),
    }
    for embedder in (t5, clip):
        plain = embedder([f"{text}. 8 FPS." for text in said])
        others = embedder([f"{text}. 8 FPS." for texts in said.values() for text in texts])
        pooled, theirs = (x.mean(1) if x.ndim == 3 else x for x in (plain, others))
        nearest = torch.cdist(theirs, pooled).argmin(1)
        assert nearest.tolist() == [i for i in range(len(said)) for _ in range(2)]


def test_shipped_folders_are_small():
    files = [f for name in (T5_FOLDER, CLIP_FOLDER) for f in (ROOT / "assets/demo" / name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 1.6e6
    kinds = {json.loads(f.read_text())["model_type"] for f in files if f.name == "config.json"}
    assert kinds == {"t5", "clip_text_model"}


def test_prompt_table_has_held_out_and_trained_prompts():
    texts = pd.read_csv(ROOT / "assets/texts/demo.csv")["text"].tolist()
    assert len(texts) == len(set(texts)) == 8
    held_out = [t for t in texts if any(f"{c.color} {c.shape}" in t and c.motion in t for c in HELD_OUT)]
    assert 2 <= len(held_out) < 8


def test_existing_folders_are_kept(tmp_path: Path):
    (tmp_path / T5_FOLDER).mkdir(parents=True)
    with pytest.raises(UserError, match="--overwrite"):
        train_text(tmp_path, seed=0, steps=1, batch_size=1, count=1, overwrite=False)
    with pytest.raises(UserError, match="--steps"):
        train_text(tmp_path, seed=0, steps=0, batch_size=1, count=1, overwrite=True)


def test_training_writes_both_folders(tmp_path: Path):
    train_text(tmp_path, seed=0, steps=1, batch_size=4, count=4, overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["google", "openai"]
    for name in (T5_FOLDER, CLIP_FOLDER):
        assert (tmp_path / name / "model.safetensors").stat().st_mode & 0o044
        assert HFEmbedder(str(tmp_path / name), max_length=24)(["a red circle"]).isfinite().all()
