"""What files and folders hold is known, and what cannot be used is refused, before any tensor is read."""

import json
import re
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.models.build import build_ready, check_all_weights
from opensora.models.inspect import inspect
from opensora.models.text import HFEmbedder
from opensora.utils import hub, weights
from opensora.utils.errors import UserError
from tests.conftest import ROOT

DEMO = ROOT / "assets" / "demo"
T5, CLIP = DEMO / "google/t5-demo", DEMO / "openai/clip-demo"


@pytest.fixture
def sections():
    cfg = load_config(ROOT / "configs/diffusion/inference/demo.py", InferenceOptions, {})
    return {name: getattr(cfg, name) for name in ("model", "ae", "t5", "clip")}


@pytest.fixture
def check(sections, monkeypatch):
    """Check the sections of the demo with other weights in some; no tensor may be read."""
    monkeypatch.chdir(ROOT)

    def unread(*args, **kwargs):
        raise AssertionError("tensors were read")

    monkeypatch.setattr(weights.WeightFiles, "tensors", unread)

    def check(**paths):
        for name, path in paths.items():
            sections[name] = replace(sections[name], from_pretrained=str(path))
        check_all_weights(sections, {})

    return check


def refused(check, **paths) -> str:
    with pytest.raises(UserError) as error:
        check(**paths)
    return str(error.value)


def checkpoint(folder, *parts):
    """A folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "running_states.json").write_text("{}")
    for part in parts:
        (folder / part).parent.mkdir(exist_ok=True)
        shutil.copy(DEMO / "mmdit.safetensors", folder / part)
    return folder


def test_the_demo_is_whole(check):
    check()


def test_what_things_hold(tmp_path):
    save_file({"transformer.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "style.safetensors")
    torch.save({"img_in.weight": torch.ones(2, 3)}, tmp_path / "m.pt")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    whole = checkpoint(tmp_path / "epoch0-global_step2", "model/model.safetensors", "ema.safetensors")
    averaged = checkpoint(tmp_path / "epoch1-global_step3", "ema.safetensors")
    said = {
        DEMO / "mmdit.safetensors": r"an MMDiT, 130 tensors \(130 of F16\)",
        DEMO / "vae.safetensors": "a causal video autoencoder, 188 tensors",
        T5: "a T5 text encoder, 21 tensors",
        CLIP: "a CLIP text encoder, 36 tensors",
        tmp_path / "style.safetensors": "a LoRA adapter, 1 tensors",
        tmp_path / "m.pt": r"an MMDiT, 1 tensors \(1 of float32\)",
        tmp_path / "x.safetensors": "weights of an unknown kind",
        whole: "a checkpoint of an MMDiT, 130 tensors .* with model, ema",
        averaged: "a checkpoint of training without its model with ema",
    }
    for path, text in said.items():
        assert re.fullmatch(rf"{text}.*", str(inspect(path))), str(inspect(path))
    with pytest.raises(UserError, match="No weights at"):
        inspect(tmp_path / "gone")


def test_text_encoders_swapped(check):
    answer = refused(check, t5=CLIP, clip=T5)
    assert re.search(r"t5\.from_pretrained=\S+clip-demo holds a CLIP text encoder, t5 needs a T5 one", answer)
    assert re.search(r"clip\.from_pretrained=\S+t5-demo holds a T5 text encoder, clip needs a CLIP one", answer)


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("model", DEMO / "vae.safetensors", "is a causal video autoencoder .*not an MMDiT"),
        ("ae", DEMO / "mmdit.safetensors", "is an MMDiT .*not a causal video autoencoder"),
        ("model", T5, "holds a T5 text encoder.* model needs an MMDiT"),
        ("ae", CLIP, "holds a CLIP text encoder.* ae needs a causal video autoencoder"),
        ("t5", DEMO / "vae.safetensors", "holds a causal video autoencoder.*needs the folder of a text encoder"),
        ("t5", DEMO, "no usable config.json"),
    ],
)
def test_weights_of_another_model(check, name, path, said):
    assert re.search(f"(?s){said}", refused(check, **{name: path}))


def test_all_that_is_missing_is_told_at_once(check, monkeypatch, tmp_path):
    answer = refused(
        check,
        model=tmp_path / "Open_Sora_v2.safetensors",
        ae=tmp_path / "hunyuan_vae.safetensors",
        t5=tmp_path / "google/t5-v1_1-xxl",
        clip=tmp_path / "openai/clip-vit-large-patch14",
    )
    assert answer.count("hf download hpcai-tech/Open-Sora-v2") == 4


def other_model(tmp_path, change, suffix=".safetensors"):
    state = load_file(DEMO / "mmdit.safetensors")
    change(state)
    path = tmp_path / f"other{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update({"img_in.weight": state["img_in.weight"].to(torch.int8)}), "of integers.*img_in.w"),
        (lambda state: state.pop("txt_in.bias"), "missing in the file: txt_in.bias"),
        (lambda state: state.update(extra=torch.ones(1)), "not in the model: extra"),
    ],
)
def test_files_that_do_not_fit(check, tmp_path, change, said, suffix):
    assert re.search(f"(?s){said}", refused(check, model=other_model(tmp_path, change, suffix)))


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04junk", weights.OLD_PICKLE, b"\x80\x04K\x01."])
def test_junk(check, tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert str(path) in refused(check, model=path)


def test_random_junk(check, tmp_path):
    path = tmp_path / "model.pt"
    generator = torch.Generator().manual_seed(0)
    for start in (b"", b"\x80\x02", weights.OLD_PICKLE):
        for _ in range(15):
            path.write_bytes(start + bytes(torch.randint(256, (40,), generator=generator).tolist()))
            assert str(path) in refused(check, model=path)


def test_a_huge_header_is_not_believed(check, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    assert "truncated" in refused(check, model=path)


def test_weights_that_are_not_finite(sections, tmp_path):
    for value in (float("nan"), float("inf")):
        path = other_model(tmp_path, lambda state, value=value: state["txt_in.bias"].__setitem__(3, value))
        with pytest.raises(UserError, match=r"other\.safetensors: txt_in\.bias is not finite"):
            build_ready(replace(sections["model"], from_pretrained=str(path)), "cpu", torch.float32)
    path = other_model(tmp_path, lambda state: state.update({"txt_in.bias": torch.full((160,), 1e6)}))
    with pytest.raises(UserError, match=r"too large for float16"):
        build_ready(replace(sections["model"], from_pretrained=str(path)), "cpu", torch.float16)
    folder = shutil.copytree(T5, tmp_path / "t5")
    state = load_file(folder / "model.safetensors")
    state["shared.weight"][7, 7] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"shared\.weight is not finite"):
        HFEmbedder(str(folder), 16)


@pytest.mark.parametrize("name", ["t5", "clip"])
@pytest.mark.parametrize("layers", [1, 3])
def test_an_encoder_with_other_layers_than_its_file(check, tmp_path, name, layers):
    folder = shutil.copytree({"t5": T5, "clip": CLIP}[name], tmp_path / name)
    key = {"t5": "num_layers", "clip": "num_hidden_layers"}[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: layers}))
    said = f"its weights have 2 layers, its config.json says {key}={layers}"
    assert said in refused(check, **{name: folder})
    with pytest.raises(UserError, match=said):
        HFEmbedder(str(folder), 16)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_encoders_that_are_not_whole(check, tmp_path, name):
    def copy(case):
        return shutil.copytree({"t5": T5, "clip": CLIP}[name], tmp_path / case)

    folder = copy("lost")
    state = load_file(folder / "model.safetensors")
    lost = next(key for key in state if "encoder" in key and "1.layer" in key)
    save_file({key: value for key, value in state.items() if key != lost}, folder / "model.safetensors")
    assert f"its weights lack {lost}" in refused(check, **{name: folder})
    folder = copy("integers")
    save_file({**state, lost: state[lost].to(torch.int8)}, folder / "model.safetensors")
    assert f"integers for weights, as quantised files do: {lost}" in refused(check, **{name: folder})
    folder = copy("empty")
    (folder / "model.safetensors").unlink()
    assert "it has no weights" in refused(check, **{name: folder})
    torch.save(state, folder / "pytorch_model.bin")
    check(**{name: folder})
    folder = copy("words")
    for file in folder.glob("*"):
        if file.name in ("spiece.model", "vocab.json"):
            file.unlink()
    assert "its tokenizer lacks" in refused(check, **{name: folder})


def cut_at_a_line(words: bytes) -> bytes:
    return b"".join(words.splitlines(keepends=True)[:300])


def cut_before_settings(model: bytes) -> bytes:
    """Every piece of a SentencePiece model, and nothing after them: it still can be parsed."""
    parsed = sentencepiece_model_pb2.ModelProto.FromString(model)
    for part in ("trainer_spec", "normalizer_spec"):
        parsed.ClearField(part)
    return parsed.SerializeToString()


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("t5", "spiece.model", lambda whole: whole[:-1], "damaged or cut short"),
        ("t5", "spiece.model", lambda whole: b"", "cut short"),
        ("t5", "spiece.model", cut_before_settings, "ends before its settings"),
        ("t5", "tokenizer.json", lambda whole: b'{"model": ', "damaged or cut short"),
        ("clip", "vocab.json", lambda whole: whole[:-40], "damaged or cut short"),
        ("clip", "vocab.json", lambda whole: b"[1, 2]", "damaged or cut short"),
        ("clip", "vocab.json", lambda whole: b'{"a": 0, "b": 1}', "merges.txt is damaged .*line 2: 'n d</w>'"),
        (
            "clip",
            "vocab.json",
            lambda whole: b'{"a": 0, "b": 5000}',
            "has 5001 tokens, its config.json says vocab_size",
        ),
        ("clip", "merges.txt", lambda whole: whole[:1000], "merges.txt is cut short"),
        ("clip", "merges.txt", cut_at_a_line, "cut short, or not of its vocab.json: 301 tokens"),
        ("clip", "merges.txt", lambda whole: b"\xff", "not UTF-8"),
        ("clip", "merges.txt", lambda whole: b"", "cut short"),
    ],
)
def test_vocabularies_that_are_damaged(check, tmp_path, name, file, change, said):
    folder = shutil.copytree({"t5": T5, "clip": CLIP}[name], tmp_path / name)
    (folder / file).write_bytes(change((folder / file).read_bytes() if (folder / file).exists() else b""))
    answer = refused(check, **{name: folder})
    assert re.search(f"{re.escape(str(folder))}: its .*{said}", answer), answer


def test_a_tokenizer_in_one_file_takes_the_place_of_others(check, tmp_path):
    folder = shutil.copytree(CLIP, tmp_path / "clip")
    words = json.loads((folder / "vocab.json").read_text())
    Tokenizer(models.BPE(words, [])).save(str(folder / "tokenizer.json"))
    (folder / "merges.txt").write_text("")
    check(clip=folder)


def test_hub_ids_of_text_encoders_swapped(check):
    answer = refused(check, t5="openai/clip-vit-large-patch14", clip="google/t5-v1_1-xxl")
    assert "t5.from_pretrained=openai/clip-vit-large-patch14 names a CLIP text encoder" in answer
    assert "clip.from_pretrained=google/t5-v1_1-xxl names a T5 text encoder" in answer


@pytest.mark.parametrize("key", ["d_model", "vocab_size", "num_layers"])
@pytest.mark.parametrize("value", ["x", None, [1], 7])
def test_configs_that_cannot_be(check, tmp_path, key, value):
    folder = shutil.copytree(T5, tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert str(folder) in refused(check, t5=folder)


def test_a_checkpoint_without_its_model(check, tmp_path):
    folder = checkpoint(tmp_path / "epoch1-global_step3", "ema.safetensors")
    answer = refused(check, model=folder)
    assert re.search(r"checkpoint without its folder model, .*averaged weights.*name \S+/ema\.safetensors", answer)
    check(model=folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    (folder / "lora").mkdir()
    assert re.search(r"holds an adapter: .*--pretrained-lora-path \S+/lora", refused(check, model=folder))
    check(model=checkpoint(tmp_path / "whole", "model/model.safetensors", "ema.safetensors"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/repo/net.safetensors", True),
        ("org/repo/sub/net.pt", True),
        ("outputs/x/epoch0-global_step2", False),
        ("outputs/x/epoch0-global_step2/model/model.safetensors", False),
        ("/a/b/c.pt", False),
        ("./a/b/c.pt", False),
        ("a//b/c.pt", False),
        ("there/x/net.safetensors", False),
        ("org/net.safetensors", False),
    ],
)
def test_what_can_be_on_the_hub(path, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert weights.is_hub_path(path) == expected


def test_a_mistyped_checkpoint_is_not_looked_for_on_the_hub(check, monkeypatch):
    monkeypatch.setattr(hub, "download", None)
    assert "No weights at outputs/x/epoch0-global_step2." in refused(check, model="outputs/x/epoch0-global_step2")
