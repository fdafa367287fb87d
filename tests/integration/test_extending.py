"""docs/extending.md works as it stands: its package, outside of this one, is generated and trained with."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from opensora.acceleration.plugins import check_training
from opensora.config import choices, load_config, parse_config
from opensora.config.commands import InferenceOptions, TrainOptions
from opensora.config.options import ModelOptions, PluginOptions
from opensora.config.registries import DATASETS, MODELS
from opensora.diffusion.conditions import get_spans
from opensora.models import build
from opensora.models.autoencoder import Autoencoder
from opensora.utils.errors import UserError
from opensora.utils.video import save_video, video_info
from tests.helpers.cli import load_main
from tests.integration.own_package import with_page, write_package

ROOT = Path(__file__).parents[2]
TABLES = (
    *(choices.CONDITIONS, choices.SOLVERS, choices.STEP_CACHES, choices.ATTENTION_KERNELS, choices.METHODS),
    choices.TRACKERS,
)


@pytest.fixture(scope="module", autouse=True)
def own_tables():
    """What a test registers is forgotten when this module is done."""
    with pytest.MonkeyPatch.context() as patch:
        for table in TABLES:
            patch.setattr(table, "_added", dict(table._added))
        patch.setattr(sys, "path", [*sys.path])
        before = {registry: registry.own for registry in (MODELS, DATASETS)}
        yield
        for registry, names in before.items():
            for name in set(registry.own) - set(names):
                del registry.module_dict[name]
                registry._configs.pop(name, None)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_package(folder)
    return folder


@pytest.fixture(scope="module")
def sampling(tiny_config, folder, write_config):
    """Config file that samples with all of the package but its diffusion model."""
    return write_config(folder / "video.py", with_page(tiny_config, "video.py"))


@pytest.fixture(scope="module")
def vae_training(folder, write_config):
    """Config file that trains and measures the package's autoencoder on its dataset."""
    content = {
        "imports": ["my_package"],
        "dataset": {"type": "moving_bars", "count": 4, "side": 32},
        "model": {"type": "patch_ae", "latent_channels": 4},
        "bucket_config": {"32px_ar1:1": {9: (1.0, 2)}},
        **{"device": "cpu", "dtype": "fp32", "num_workers": 0},
    }
    return write_config(folder / "vae.py", content)


@pytest.fixture(scope="module")
def autoencoder(vae_training, folder):
    """Weights of the package's autoencoder, trained for a step."""
    words = ("--outputs", folder / "vae", "--exp-name", "vae", "--max-steps", 1, "--plugin", "none", "--optim.lr", 1e-3)
    script("vae/train.py", vae_training, *words)
    return next((folder / "vae" / "vae").glob("*-global_step1")) / "model" / "model.safetensors"


@pytest.fixture(scope="module")
def training(tiny_config, folder, autoencoder, write_config):
    """Config file that trains with the package's dataset, autoencoder, condition and method."""
    content = with_page({key: tiny_config[key] for key in ("model", "t5", "clip", "device", "dtype")}, "train.py")
    content["dataset"] |= {"count": 8, "side": 32}
    content["ae"]["from_pretrained"] = str(autoencoder)
    content |= {
        "bucket_config": {"32px_ar1:1": {9: (1.0, 2)}},
        "optim": {"cls": "AdamW", "lr": 1e-3},
        **{"plugin": "none", "num_workers": 2, "max_steps": 4, "ckpt_every": 2, "outputs": str(folder / "outputs")},
    }
    return write_config(folder / "train.py", content)


def script(name: str, *words: object) -> None:
    load_main(ROOT / "scripts" / name)([str(word) for word in words])


def weights(folder: Path, step: int, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob(f"epoch*-global_step{step}")) / part / "model.safetensors")


@pytest.fixture
def calls(sampling, monkeypatch):
    """How often each of the package's functions is called in sampling."""
    parse_config([sampling], InferenceOptions)
    counts: Counter[str] = Counter()

    def counted(name, function):
        return lambda *args, **keys: counts.update([name]) or function(*args, **keys)

    for table, name in ((choices.SOLVERS, "midpoint"), (choices.ATTENTION_KERNELS, "query_chunks")):
        monkeypatch.setitem(table._added, name, counted(name, table.get(name)))
    cache = sys.modules["my_package.step_cache"].EverySecond
    monkeypatch.setattr(cache, "around_blocks", counted("every_second", cache.around_blocks))
    autoencoder = sys.modules["my_package.autoencoder"].PatchAutoencoder
    monkeypatch.setattr(autoencoder, "decode", counted("patch_ae", autoencoder.decode))
    return counts


def test_generates(sampling, folder, calls, capsys):
    rng = np.random.default_rng(0)
    refs = [save_video(rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", 8) for i in range(2)]
    words = ["--prompt", "a bar", "--ref", ";".join(map(str, refs)), "--sampling_option.seed", 1]
    script("diffusion/inference.py", sampling, *words, "--dry-run", True, "--save-dir", folder / "dry")
    plan = capsys.readouterr().out
    assert "v2v_bridge" in plan
    assert "4 by midpoint" in plan
    calls.clear()
    script("diffusion/inference.py", sampling, *words, "--save-dir", folder / "videos")
    (video,) = (folder / "videos").rglob("*.mp4")
    assert video_info(video).num_frames == 9
    assert all(calls[name] for name in ("midpoint", "query_chunks", "every_second", "patch_ae"))


def test_trains_and_resumes_exactly(training, folder):
    script("diffusion/train.py", training, "--exp-name", "whole")
    whole, parts = folder / "outputs" / "whole", folder / "outputs" / "parts"
    parts.mkdir()
    next(whole.glob("epoch*-global_step2")).rename(parts / "epoch0-global_step2")
    script("diffusion/train.py", training, "--load", parts)
    for part in ("model", "weight"):
        start, one, other = weights(parts, 2, part), weights(whole, 4, part), weights(parts, 4, part)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert not all(torch.equal(one[key], start[key]) for key in one)
    entries = [json.loads(line) for line in (whole / "curves.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all("loss" in entry for entry in entries)
    log = (parts / "log.txt").read_text()
    assert all(f"{name}=" in log for name in ("plain_loss", "log_variance", "weight_grad_norm"))


def test_trains_on_a_cache(training, folder):
    cache = ("--cache-dir", folder / "cache", "--num-workers", 0)
    script("diffusion/cache.py", training, *cache)
    words = (*cache, "--cached-video", "--cached-text", "--max-steps", 1)
    script("diffusion/train.py", training, *words, "--exp-name", "cached", "--ae.scale_factor", 2)
    assert weights(folder / "outputs" / "cached", 1)
    with pytest.raises(UserError, match="dataset.side: 32 then, 40 now"):
        script("diffusion/train.py", training, *words, "--dataset.side", 40)


def test_measures_the_autoencoder(vae_training, autoencoder, folder):
    words = ("--eval_setting", "9x32", "--save-dir", folder / "measured", "--verbose", 0)
    script("vae/inference.py", vae_training, "--ckpt-path", autoencoder, *words)
    assert len((folder / "measured" / "metrics.csv").read_text().splitlines()) == 1 + 4


def test_a_diffusion_model(training, sampling, tiny_config, folder, write_config):
    keys = ("in_channels", "vec_in_dim", "context_in_dim", "cond_embed")
    model = {"type": "plain_transformer", **{key: tiny_config["model"][key] for key in keys}}
    content = load_config(training, TrainOptions).to_dict() | {"model": model, "num_workers": 0}
    config = write_config(folder / "own_model.py", content)
    script("diffusion/train.py", config, "--exp-name", "own", "--max-steps", 1)
    content = load_config(sampling, InferenceOptions).to_dict() | {"model": model}
    config = write_config(folder / "own_model_video.py", content)
    checkpoint = next((folder / "outputs" / "own").glob("*-global_step1"))
    words = ("--prompt", "a bar", "--ckpt-path", checkpoint / "model" / "model.safetensors")
    with pytest.raises(UserError, match="step_cache=every_second: PlainTransformer takes no step cache"):
        script("diffusion/inference.py", config, *words)
    plain = ("--sampling_option.step_cache", "none", "--cond_type", "t2v", "--save-dir", folder / "own")
    script("diffusion/inference.py", config, *words, *plain)
    assert len([*(folder / "own").rglob("*.mp4")]) == 1
    with pytest.raises(UserError, match="tp_size and sp_size divide the MMDiT, not a PlainTransformer"):
        check_training(
            "ddp", PluginOptions(tp_size=2), build.build_on_meta(load_config(config, InferenceOptions).model), 2
        )


def test_imports_on_the_command_line(sampling, tiny_config, folder, write_config, monkeypatch, capsys):
    content = {**tiny_config, "ae": {"type": "patch_ae", "latent_channels": 4}}
    config = write_config(folder / "no_imports.py", content)
    words = ("--prompt", "a bar", "--sampling_option.solver", "midpoint", "--dry-run", True)
    monkeypatch.setattr(choices.SOLVERS, "_added", {})
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="sampling_option.solver midpoint: expected one of euler"):
        script("diffusion/inference.py", config, *words)
    script("diffusion/inference.py", config, "--imports", "my_package", *words)
    assert "4 by midpoint" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script("diffusion/inference.py", config, "--imports=my_package", "--help")
    help_text = " ".join(capsys.readouterr().out.split())
    assert "--ae.patch" in help_text
    assert "euler, heun, ab2, renoise, midpoint" in help_text


TAKEN = " is there already: register yours under another name"
GROUP = """
from dataclasses import dataclass
from opensora.config.options import DatasetOptions, ModelOptions, Options, opt
from opensora.registry import DATASETS, MODELS
{}
MODELS.register_module("bad", config=Bad)(lambda config: None)
"""


FAULTS = {
    "absent": (None, r"is not there: looked for where Python looks, and in /.*"),
    "its import": ("import nowhere_at_all", r"{}line 1\): ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "exception": ("x = 1\n1 / 0", r"{}line 2\): ZeroDivisionError: division by zero"),
    "exit": ("raise SystemExit('two\\nlines')", r"{}line 1\): SystemExit: two"),
    "syntax": ("def f(:", r"cannot be imported: SyntaxError: .*my_faulty\.py, line 1\)"),
    "solver": (
        "from opensora.config.choices import SOLVERS\nSOLVERS.register('euler')(print)",
        r"{}line 2\): the solver 'euler'" + TAKEN,
    ),
    "model": (
        "from opensora.registry import MODELS\nMODELS.register_module('flux')(dict)",
        r"{}line 2\): the model 'flux'" + TAKEN,
    ),
    "twice": (
        "from opensora.registry import DATASETS\nfor f in (dict, list): DATASETS.register_module('mine')(f)",
        r"{}line 2\): the dataset 'mine'" + TAKEN,
    ),
    "no group": (
        GROUP.format("Bad = dict"),
        r"{}line 6\): the model 'bad': the option group <class 'dict'> must be a class derived from ModelOptions",
    ),
    "other group": (
        GROUP.format("class Bad(DatasetOptions): pass"),
        r"{}.*'bad': .* must be .* derived from ModelOptions",
    ),
    "no dataclass": (
        GROUP.format("class Bad(ModelOptions):\n    size: int = opt(1, 'size')"),
        r"{}.*'bad': write @dataclass\(frozen=True, kw_only=True\) above the option group Bad",
    ),
    "no opt": (
        GROUP.format("@dataclass(frozen=True, kw_only=True)\nclass Bad(ModelOptions):\n    size: int = 1"),
        r"{}.*'bad': Bad.size: write it as `size: TYPE = opt\(DEFAULT, HELP\)`",
    ),
    "no type": (
        GROUP.format("@dataclass(frozen=True, kw_only=True)\nclass Bad(ModelOptions):\n    s: 'Int' = opt(1, 's')"),
        r"{}.*'bad': a type in Bad cannot be read: name 'Int' is not defined",
    ),
    "not frozen": (
        GROUP.format("@dataclass\nclass Bad(ModelOptions):\n    size: int = opt(1, 'size')"),
        r"{}line 5\): TypeError: cannot inherit non-frozen dataclass from a frozen one",
    ),
    "method": (
        "from opensora.training.methods.base import TrainingMethod\nclass M(TrainingMethod): options = dict",
        r"{}line 2\): the training method M: the option group <class 'dict'> must be a class derived from Options",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_imported_is_told_in_a_line(tmp_path, write_config, monkeypatch, fault):
    code, said = FAULTS[fault]
    monkeypatch.setattr(sys, "path", [*sys.path])
    if code is not None:
        (tmp_path / "my_faulty.py").write_text(code)
    config = write_config(tmp_path / "video.py", {"imports": ["my_faulty"]})
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError) as caught:
            parse_config([config], InferenceOptions)
        message = str(caught.value).removeprefix(f"{config}: imports: my_faulty ")
        assert re.fullmatch(said.format(r"cannot be imported \(my_faulty\.py, "), message), message


@pytest.mark.parametrize("wrong", [5, "my_package", [["my_package"]]])
def test_imports_is_a_list_of_names(tmp_path, write_config, wrong):
    config = write_config(tmp_path / "video.py", {"imports": wrong})
    with pytest.raises(UserError, match="imports = .*: expected list of text or none"):
        parse_config([config], InferenceOptions)


def test_a_file_is_no_module(folder, sampling):
    with pytest.raises(UserError, match=r"my_package.py is not there: .*name it as an import statement does"):
        parse_config([sampling, "--imports", "my_package.py"], InferenceOptions)


def test_a_module_may_be_read_again(sampling):
    parse_config([sampling], InferenceOptions)
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]
    parse_config([sampling], InferenceOptions)
    assert choices.SOLVERS.get("midpoint") is sys.modules["my_package.solver"].midpoint


def test_a_condition_is_made_of_spans(own_tables):
    choices.CONDITIONS.add("odd", [1, 2])
    with pytest.raises(UserError, match=r"cond_type 'odd' is \[1, 2\]: a condition is a tuple of Span"):
        get_spans("odd")


def test_a_method_is_a_class_of_methods(training, monkeypatch):
    monkeypatch.setitem(choices.METHODS._added, "odd", print)
    with pytest.raises(UserError, match="training_method=odd: .*print> is no class derived from TrainingMethod"):
        script("diffusion/train.py", training, "--training_method", "odd")


class Squares(nn.Module, Autoencoder):
    """Latents are the pixels of squares: there are no weights."""

    latent_channels, compression, is_causal = 12, (1, 2, 2), False

    def encode_stored(self, x):
        return F.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2)

    def decode(self, z):
        return F.pixel_shuffle(z.transpose(1, 2), 2).transpose(1, 2)

    def get_last_layer(self):
        raise NotImplementedError


def test_an_autoencoder_without_weights(training, folder, write_config, monkeypatch):
    warned = []
    monkeypatch.setattr(build.logger, "warning", lambda text, *_: warned.append(text))
    MODELS.register_module("squares", module=Squares)
    content = load_config(training, TrainOptions).to_dict() | {"ae": {"type": "squares"}, "num_workers": 0}
    content["model"] = {**content["model"], "in_channels": 48}
    config = write_config(folder / "squares.py", content)
    cache = ("--cache-dir", folder / "squares")
    script("diffusion/cache.py", config, *cache)
    script("diffusion/train.py", config, *cache, "--cached-video", "--exp-name", "squares", "--max-steps", 1)
    assert weights(folder / "outputs" / "squares", 1)
    for name in ("squares", "patch_ae"):
        build.build_ready(ModelOptions(type=name), "cpu", torch.float32)
        assert bool(warned) == (name == "patch_ae")  # of random weights
