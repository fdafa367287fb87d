"""Configs by name: those that come with the package, from any folder."""

import re
import shutil
from pathlib import Path

import pytest

from opensora.config import load_config, parse_config
from opensora.config.commands import (
    CacheOptions,
    InferenceOptions,
    TrainOptions,
    TrajectoryOptions,
    VaeInferenceOptions,
    VaeTrainOptions,
)
from opensora.config.shipped import find_config, shipped_names
from opensora.utils.errors import UserError
from opensora.utils.paths import shipped_root

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
GROUPS = (InferenceOptions, TrajectoryOptions, TrainOptions, CacheOptions, VaeTrainOptions, VaeInferenceOptions)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)


def test_every_shipped_config_has_a_name():
    named = {file for group in GROUPS for file in shipped_names(group.configs).values()}
    shared = ("demo_models.py", "demo_image_models.py", "demo_hc_models.py", "demo_vae.py")
    parts = {CONFIGS / "diffusion" / name for name in shared}
    parts |= {*CONFIGS.rglob("plugins/*.py"), *(CONFIGS / "data").glob("*")}
    assert named == set(CONFIGS.rglob("*.py")) - parts
    assert shipped_root() == ROOT


@pytest.mark.parametrize(
    ("group", "name", "file"),
    [
        (InferenceOptions, "demo", "diffusion/inference/demo.py"),
        (InferenceOptions, "t2i2v_256px", "diffusion/inference/t2i2v_256px.py"),
        (InferenceOptions, "demo/256px", "diffusion/inference/demo/256px.py"),
        (TrainOptions, "demo", "diffusion/train/demo.py"),
        (CacheOptions, "stage1", "diffusion/train/stage1.py"),
        (VaeTrainOptions, "demo", "vae/train/demo.py"),
        (VaeInferenceOptions, "demo", "vae/inference/demo.py"),
    ],
)
def test_a_name_is_that_of_the_scripts_own_configs(group, name, file):
    assert parse_config([name], group).config_path == str(CONFIGS / file)
    assert load_config(name, group).config_path == str(CONFIGS / file)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("demoo", "config file demoo does not exist, and no shipped config has this name; did you mean demo?"),
        ("t2i2v", "did you mean t2i2v_768px or t2i2v_256px?"),
        ("stage1", "configs/diffusion/train has one, for another command"),
        ("sp", "shipped: 256px, "),
        ("configs/diffusion/inference/demo.py", f"{CONFIGS}/diffusion/inference/demo.py comes with opensora"),
        ("256px.py", "config file 256px.py does not exist"),
        ("./demo", "config file ./demo does not exist, and no"),
        ("", ". is a folder without a config.py"),
        ("**", "config file ** does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 300, "does not exist"),
    ],
)
def test_what_is_no_config_says_what_is_near(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_config([name], InferenceOptions)


def test_a_file_of_ones_own_beside_is_offered():
    Path("mine.py").write_text("")
    with pytest.raises(UserError, match=r"config file mine does not exist.*; did you mean mine\.py\?"):
        find_config("mine", InferenceOptions.configs)


@pytest.mark.parametrize("own", ["demo.py", "demo.json", "demo/config.py"])
def test_a_name_that_could_be_two_is_refused(own):
    Path(own).parent.mkdir(exist_ok=True)
    Path(own).write_text("{}")
    with pytest.raises(UserError, match=rf"config demo is ambiguous: {own} here, or .*/demo\.py, which comes"):
        find_config("demo", InferenceOptions.configs)
    assert find_config(own, InferenceOptions.configs) == Path(own)


def test_a_path_stays_a_path_and_a_folder_may_hold_the_config(monkeypatch):
    Path("demo").write_text("")
    assert find_config("demo", InferenceOptions.configs) == Path("demo")
    Path("model").mkdir()
    shutil.copy(CONFIGS / "diffusion" / "train" / "demo_cpu_lora.py", "model/config.py")
    assert find_config("model", InferenceOptions.configs) == Path("model/config.py")
    monkeypatch.chdir(CONFIGS / "diffusion" / "inference")  # the same file under both names
    assert find_config("demo", InferenceOptions.configs).samefile("demo.py")
