"""Files that a config names are looked for beside it, then in the working folder."""

import os
from pathlib import Path

import pytest

from opensora.config import load_config, naming_places, parse_config
from opensora.config.commands import InferenceOptions, TrainOptions, VaeTrainOptions
from opensora.config.places import places_of
from opensora.models.build import check_weights
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "configs" / "diffusion" / "inference" / "demo.py"


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """``project/configs/own.py``, to be filled; the working folder is another one, beside it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "project" / "configs" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "project" / "configs" / "sub" / "own.py"


def touch(*paths: Path | str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def read(path: Path, text: str, *words: str) -> InferenceOptions:
    path.write_text(text)
    return parse_config([str(path), *words], InferenceOptions)


def test_shipped_configs_find_their_weights_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("demo", InferenceOptions)
    assert cfg.ae.from_pretrained == str(ROOT / "assets" / "demo" / "vae.safetensors")
    assert cfg.t5.from_pretrained == str(ROOT / "assets" / "demo" / "google" / "t5-demo")
    trained = load_config("demo_cpu_lora", TrainOptions)
    assert trained.model.from_pretrained == str(ROOT / "assets" / "demo" / "mmdit.safetensors")
    assert trained.outputs == "./outputs", "what is written goes to the working folder"


def test_a_path_that_leads_to_the_same_file_stays_as_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_config("demo", InferenceOptions).ae.from_pretrained == "assets/demo/vae.safetensors"


def test_order_of_the_places(own):
    text = 'ae = dict(type="hunyuan_vae", from_pretrained="ae/x.safetensors")'
    work, project = Path.cwd() / "ae/x.safetensors", own.parents[2] / "ae/x.safetensors"
    found = [read(own, text).ae.from_pretrained]
    touch(work)
    found.append(read(own, text).ae.from_pretrained)
    touch(project)
    found.append(read(own, text).ae.from_pretrained)
    touch(own.parent / "ae/x.safetensors.index.json")  # shards stand for the file
    found.append(read(own, text).ae.from_pretrained)
    assert found == [*["ae/x.safetensors"] * 2, str(project), str(own.parent / "ae/x.safetensors")]
    assert read(own, text, "--ae.from_pretrained", "ae/x.safetensors").ae.from_pretrained == "ae/x.safetensors"


def test_a_config_that_builds_on_a_shipped_one_finds_its_weights(own):
    cfg = read(own, f'_base_ = ["{os.path.relpath(DEMO, own.parent)}"]')
    assert cfg.model.from_pretrained == str(ROOT / "assets" / "demo" / "mmdit.safetensors")
    assert places_of([own, DEMO]) == (own.parent, own.parents[2], DEMO.parent, ROOT)


def test_several_paths_in_one_text(own):
    touch(own.parent / "a.png", own.parent / "style/adapter_config.json", own.parent / "odd@2")
    refs = "a.png; b.png;http://h/a.png;a.png@64;gone.png@-1"
    cfg = read(own, f'ref = "{refs}"\npretrained_lora_path = "style@0.5,gone@2, odd@2"')
    folder = own.parent
    assert cfg.ref == f"{folder}/a.png;b.png;http://h/a.png;{folder}/a.png@64;gone.png@-1"
    assert cfg.pretrained_lora_path == f"{folder}/style@0.5,gone@2,{folder}/odd@2"
    cfg = read(own, 'pretrained_lora_path = ["style@0.5", "gone"]')
    assert cfg.pretrained_lora_path == [f"{folder}/style@0.5", "gone"]


def test_sections_within_sections(own):
    touch(own.parent / "heads.pth", own.parent / "held.csv", own.parent / "a.png")
    own.write_text('vae_loss_config = dict(lpips=dict(heads="heads.pth", backbone="~/vgg.pth"))')
    cfg = parse_config([str(own)], VaeTrainOptions)
    assert cfg.vae_loss_config.lpips.heads == str(own.parent / "heads.pth")
    assert cfg.vae_loss_config.lpips.backbone == "~/vgg.pth"
    own.write_text('validation = dict(data_path="held.csv")\nsamples = dict(refs=["a.png", "gone.png"])')
    trained = parse_config([str(own)], TrainOptions)
    assert trained.validation.data_path == str(own.parent / "held.csv")
    assert trained.samples.refs == [str(own.parent / "a.png"), "gone.png"]


def test_an_error_about_a_file_of_the_config_says_all_places(own):
    cfg = read(own, 'ae = dict(type="hunyuan_vae", from_pretrained="./ckpts/hunyuan_vae.safetensors")')
    with pytest.raises(UserError) as error, naming_places(cfg):
        check_weights("ae", cfg.ae)
    said = f"looked for in {own.parent}, then in {own.parents[2]}, then in {Path.cwd()}"
    assert str(error.value).startswith("No weights at ./ckpts/hunyuan_vae.safetensors. Download it with:")
    assert str(error.value).splitlines()[-1] == f"./ckpts/hunyuan_vae.safetensors of {own}: {said}"


def test_other_errors_stay_as_they_are(own):
    cfg = read(own, 'ae = dict(type="hunyuan_vae", from_pretrained="./ckpts/x.safetensors")', "--ref", "gone.png")
    for message in ("seed: wrong", "gone.png: no such file", "/elsewhere/ckpts/x.safetensors is damaged"):
        with pytest.raises(UserError) as error, naming_places(cfg):
            raise UserError(message)
        assert str(error.value) == message
    with pytest.raises(KeyError), naming_places(cfg):
        raise KeyError("./ckpts/x.safetensors")
