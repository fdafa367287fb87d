"""What ``pip install .`` installs: the package with its configs and assets, and the command."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.utils.paths import own_command

ROOT = Path(__file__).parents[2]
SOURCES = ("opensora", "configs", "assets", "setup.py", "pyproject.toml", "LICENSE")
MOST_BYTES = 40e6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of these sources, built beside them so that nothing is left in the checkout."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    subprocess.run([*command, "."], cwd=folder, capture_output=True, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_code_configs_and_assets(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "opensora").rglob("*.py")}
    data = {
        f"opensora/_data/{path.relative_to(ROOT)}"
        for folder in ("configs", "assets")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == code | data | {"opensora/py.typed"}
    assert wheel.stat().st_size < MOST_BYTES


def test_it_brings_the_command(wheel):
    (entry,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")]
    assert "opensora = opensora.cli.main:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_names_and_paths_lead_into_it(wheel, tmp_path, monkeypatch):
    """As installed, in an empty folder."""
    package = tmp_path / "site" / "opensora"
    zipfile.ZipFile(wheel).extractall(package.parent)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("opensora.utils.paths.PACKAGE", package)
    assert own_command("decode", "scripts/decode.py") == "opensora decode"
    cfg = load_config("demo", InferenceOptions)
    paths = [cfg.config_path, *(section.from_pretrained for section in (cfg.model, cfg.ae, cfg.t5, cfg.clip))]
    assert all(Path(path).is_relative_to(package / "_data") and Path(path).exists() for path in paths)
    assert load_config("stage1", TrainOptions).config_path == str(package / "_data/configs/diffusion/train/stage1.py")
