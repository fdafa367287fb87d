"""Stages by name: found in their files, their options in the config, the chain that one alone needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from opensora.utils.errors import UserError
from tools.data import chain, stages
from tools.data.chain import STAGES, chain_for, find_stages
from tools.data.options import DataOptions, with_sections

NEW_STAGE = '''
from dataclasses import dataclass
import polars as pl
from opensora.config.options import Options, opt
from tools.data.engine.stage import Stage


@dataclass(frozen=True, kw_only=True)
class LengthOptions(Options):
    """Letters of the file's name."""

    factor: int = opt(1, "times", least=1, most=9)


class Length(Stage):
    settings: LengthOptions
    name = "length"
    reads = ("path", "source_id")
    adds = {"letters": pl.Int64}

    def worker(self):
        return lambda row: [{"letters": len(row["path"]) * self.settings.factor}]
'''


@pytest.fixture
def new_stage(tmp_path, monkeypatch):
    """A stage in a file of its own, in the stages' room."""
    (tmp_path / "length_of_name.py").write_text(NEW_STAGE)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
    monkeypatch.setattr(chain, "STAGES", find_stages())


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "config" / "c.py"
    path.parent.mkdir()
    path.write_text('stages = ["ingest"]\nfilter = dict(tiers=dict(base=dict(sharpness=[2, None])))\n')
    return str(path)


def test_a_stage_is_added_by_adding_a_file(new_stage, config):
    cfg = chain.parse([config, "--stages", "ingest,length", "--length.factor", "3"])
    (stage,) = chain.make_stages(["length"], cfg, Path())
    assert stage.worker()({"path": "abcd"}) == [{"letters": 12}]
    assert chain_for("length", cfg, ["path", "size", "mtime"]) == ["ingest", "length"]
    with pytest.raises(UserError, match="--length.factor=10: must be at least 1 and at most 9"):
        chain.parse([config, "--length.factor", "10"])


def test_options_are_of_their_own_classes(config):
    cfg = chain.parse([config, "--cut.crf", "3", "--workers", "2"])
    assert isinstance(cfg, DataOptions)
    assert cfg.workers == 2
    for name, kind in STAGES.items():
        assert kind.name == name
        assert isinstance(getattr(cfg, name, kind.options()()), kind.options())
    (cut,) = chain.make_stages(["cut"], cfg, Path())
    assert (cut.settings.crf, cut.settings.max_side) == (3, 1080)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_can_stand_alone(name, config):
    cfg = chain.parse([config])
    whole = name not in ("ingest", "scenes", "cut")
    found = chain_for(name, cfg, ["path", "size", "mtime", "text"])
    assert (found[0], found[-1]) == ("ingest", name)
    assert ("whole" in found) == (whole and name not in ("filter", "final")) or name in ("filter", "final")
    assert "cut" not in found or name == "cut"


def test_help_and_mistyped_keys_need_no_torch(config):
    code = "import sys; from tools.data import chain; chain.parse([sys.argv[1]]); print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, config]
    made = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[4], check=True)
    assert made.stdout.split() == ["False"]


def test_every_number_has_a_range():
    from opensora.config.keys import walk_options

    for dotted, option, _ in walk_options(with_sections(STAGES), None):
        if option.hint in (int, float, int | None, float | None):
            assert "most" in option.metadata, dotted
            assert {"least", "above"} & set(option.metadata), dotted
