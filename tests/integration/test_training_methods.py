"""Training methods by name: one from outside the package, with a module and an optimizer of its own."""

import sys
import textwrap
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from opensora.config import load_config, parse_config
from opensora.config.choices import METHODS
from opensora.config.commands import TrainOptions
from opensora.config.registries import MODELS, LazyRegistry
from opensora.training.checkpoint.folder import load_part
from opensora.training.diffusion.trainer import Trainer
from opensora.utils.errors import UserError

METHOD = '''
"""Loss on the predicted data, weighted by its time, and a critic that learns how large that loss is."""

from dataclasses import dataclass

import torch
from torch import nn

from opensora.config.choices import METHODS
from opensora.config.options import OptimOptions, Options, opt, section
from opensora.training.methods.base import TrainingMethod
from opensora.training.roles import MODEL, Turn
from opensora.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WeightedOptions(Options):
    power: float = opt(2.0, "how fast the weight falls with time", least=0)
    critic: OptimOptions = section(OptimOptions, "optimizer of the critic", {}, open=True)


@METHODS.register("x0_weighted")
class X0Weighted(TrainingMethod):
    options = WeightedOptions

    def __init__(self, context):
        super().__init__(context)
        self.critic = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(context.run.master_dtype)
        self.roles = [context.role("critic", self.critic, context.options.critic)]

    @classmethod
    def check(cls, cfg, options, model):
        if options.power > 10:
            raise UserError("training_method_config.power: more than 10 leaves nothing to learn")

    def __call__(self, batch, generator):
        prepared = self.context.encode(batch, generator)
        inputs = prepared["inputs"]
        t = inputs["timesteps"].float()
        error = (self.context.model(**inputs).float() - prepared["target"].float()) * t[:, None, None]  # of x_0
        per_sample = error.square().mean((1, 2))
        yield Turn(MODEL, (per_sample * (1 - t) ** self.context.options.power).mean(), {"x0_loss": per_sample.mean()})
        guess = self.roles[0].engine.model(t[:, None].to(self.critic[0].weight.dtype))[:, 0].float()
        loss = (guess - per_sample.detach()).square().mean()
        yield Turn("critic", loss, {"critic_loss": loss.detach()})
'''
OPTIONS = {"power": 1.5, "critic": {"cls": "AdamW", "lr": 1e-2}}
FILES = ("model/model.safetensors", "ema.safetensors", "critic/model.safetensors")


@pytest.fixture
def own(tmp_path, diffusion_content, write_config, monkeypatch):
    """Config file that trains by a method of the user's own, which lies beside it."""
    (tmp_path / "own_method_of_a_user.py").write_text(textwrap.dedent(METHOD))
    monkeypatch.setattr(METHODS, "_added", {})
    monkeypatch.delitem(sys.modules, "own_method_of_a_user", raising=False)
    content = {
        **diffusion_content,
        "imports": ["own_method_of_a_user"],
        "training_method": "x0_weighted",
        "training_method_config": OPTIONS,
        "accumulation_steps": 2,
    }
    return write_config(tmp_path / "own.py", content)


def train(config, *words):
    torch.manual_seed(0)  # of the random autoencoder
    return Trainer(parse_config([config, *map(str, words)], TrainOptions)).run()


def weights(folder, step):
    checkpoint = next(folder.glob(f"epoch*-global_step{step}"))
    return {(file, key): value for file in FILES for key, value in load_file(checkpoint / file).items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_method_with_an_optimizer_of_its_own_resumes_exactly(own, dtype):
    words = ("--dtype", dtype, "--save-master-weights", True, "--load-master-weights", True)
    whole = train(own, "--exp-name", "whole", *words)
    first = next(whole.glob("epoch*-global_step3"))
    parts = whole.with_name("parts")
    parts.mkdir()
    first.rename(parts / first.name)
    assert train(own, "--load", parts, *words).resolve() == parts.resolve()
    a, b = weights(whole, 5), weights(parts, 5)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    start = weights(parts, 3)
    assert not all(torch.equal(a[key], start[key]) for key in a if key[0].startswith("critic"))  # it trains
    states = [load_part(next(f.glob("epoch*-global_step5")), "critic_optimizer") for f in (whole, parts)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert all(torch.equal(x["exp_avg"], states[1]["state"][i]["exp_avg"]) for i, x in states[0]["state"].items())
    assert (next(parts.glob("epoch*-global_step5")) / "critic_master").is_dir() == (dtype == "bf16")
    log = (parts / "log.txt").read_text()
    assert all(f"{name}=" in log for name in ("x0_loss", "critic_loss", "critic_grad_norm", "grad_norm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_method": "x0_waited"}, "training_method x0_waited: expected one of flow_matching, .*x0_weighted"),
        ({"training_method_config": {"powr": 1.0}}, r"training_method_config\.powr.*did you mean.*power"),
        ({"training_method_config": {"power": -1.0}}, r"training_method_config\.power=-1.0: must be at least 0"),
        ({"training_method_config": {"power": 11.0}}, "more than 10"),
    ],
)
def test_mistakes_in_a_method_are_named_before_weights(own, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(load_config(own, TrainOptions, changes))


def test_every_model_is_built_on_meta_once(diffusion, monkeypatch):
    built = Counter()
    resolve = LazyRegistry.resolve
    monkeypatch.setattr(LazyRegistry, "resolve", lambda self, name: built.update([name]) or resolve(self, name))
    Trainer(parse_config([diffusion], TrainOptions))
    assert {name: built[name] for name in MODELS.names if built[name]} == {"flux": 1, "hunyuan_vae": 1}
