"""The Python examples of README and docs run as they stand, and their commands name configs and keys that exist."""

import re
import shlex
from pathlib import Path

import pytest

from opensora.acceleration.plugins import check_training
from opensora.cli.main import split_processes
from opensora.config import parse_config
from opensora.config.commands import (
    CacheOptions,
    InferenceOptions,
    ServeOptions,
    TrainOptions,
    TrajectoryOptions,
    VaeInferenceOptions,
    VaeStatsOptions,
    VaeTrainOptions,
)
from opensora.diffusion.prepared import check_parallelism
from opensora.models.build import build_on_meta

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/inference.md")
SCRIPTS = {
    "scripts/serve.py": ServeOptions,
    "scripts/diffusion/train.py": TrainOptions,
    "scripts/diffusion/cache.py": CacheOptions,
    "scripts/diffusion/trajectories.py": TrajectoryOptions,
    "scripts/vae/train.py": VaeTrainOptions,
    "scripts/vae/inference.py": VaeInferenceOptions,
    "scripts/vae/stats.py": VaeStatsOptions,
}

OPTIONS = {
    "generate": InferenceOptions,
    "serve": ServeOptions,
    "benchmark": InferenceOptions,
    "train": TrainOptions,
    "cache": CacheOptions,
    "train-vae": VaeTrainOptions,
    "reconstruct": VaeInferenceOptions,
    "vae-stats": VaeStatsOptions,
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def typed(page: str) -> list[str]:
    """The lines of a page's commands; those that a backslash continues are one."""
    return [line for block in blocks(page, "bash") for line in re.sub(r"\\\n *", "", block).splitlines()]


def commands() -> list[str]:
    pages = (*PAGES, "docs/parallel.md")
    lines = [line for page in pages for line in typed(page)]
    return sorted({line for line in lines if "scripts/diffusion/inference.py" in line})


def processes(words: list[str]) -> int:
    """How many a command starts."""
    return int(words[words.index("--nproc_per_node") + 1]) if words[0] == "torchrun" else 1


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page, tmp_path, monkeypatch):
    (example,) = blocks(page, "python")
    example = example.replace("configs/", f"{ROOT}/configs/").replace("num_steps=20", "num_steps=2")
    (tmp_path / "assets").symlink_to(ROOT / "assets")  # the demo's weights are named from the repository's root
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(example, page, "exec"), namespace)
    result = namespace["result"]
    assert result.frames[0].shape == (17, 64, 64, 3)
    assert result.timings["denoise"] > 0
    assert len(list(tmp_path.glob("*.mp4"))) == len(result.frames)


@pytest.mark.parametrize("command", commands())
def test_commands_are_valid(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    arguments = words[words.index("scripts/diffusion/inference.py") + 1 :]
    cfg = parse_config(arguments, InferenceOptions)
    if cfg.plugin == "hybrid":
        check_parallelism(cfg, build_on_meta(cfg.model), processes(words))
    table = cfg.dataset.data_path if cfg.dataset else None
    assert table is None or Path(table).is_file()
    for ref in (cfg.ref or "").split(";"):
        # a clip may come from an earlier command
        file = ref.partition("@")[0]  # without its place in the video
        assert ref == "" or ref.startswith("samples/") or Path(file).is_file()


def installed_commands() -> list[str]:
    """Those of the command ``opensora`` that take a config."""
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    lines = {line.partition("    #")[0] for page in pages for line in typed(str(page))}
    return sorted(line for line in lines if line.startswith("opensora ") and line.split()[1] in OPTIONS)


@pytest.mark.parametrize("command", installed_commands())
def test_commands_of_the_installed_package_are_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, name, *words = shlex.split(command)
    _, words = split_processes(words)
    assert parse_config(words, OPTIONS[name])


def other_commands() -> list[tuple[str, str]]:
    pages = ["README.md", "assets/demo/README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
    lines = {line for page in pages for line in typed(page)}
    return sorted((line, script) for line in lines for script in SCRIPTS if script in line.split())


@pytest.mark.parametrize(("command", "script"), other_commands())
def test_commands_of_the_other_scripts_are_valid(command, script, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    cfg = parse_config(words[words.index(script) + 1 :], SCRIPTS[script])
    if SCRIPTS[script] is TrainOptions:
        monkeypatch.setattr("opensora.acceleration.colossal.require_colossalai", lambda on_cpu: None)
        check_training(cfg.plugin, cfg.plugin_config, build_on_meta(cfg.model), processes(words))
