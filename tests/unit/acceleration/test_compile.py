"""Compiled blocks: as few graphs as there are kinds of block, and the numbers of the plain model."""

import copy
import shutil

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.testing import assert_close

from opensora.acceleration.compile import compile_blocks
from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.diffusion import reuse
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.prepared import PreparedRun
from opensora.models.quantization.linear import QuantizedLinear
from opensora.registry import MODELS, build_module
from opensora.training.weights.adapters import LoraAdapter
from opensora.utils.errors import UserError
from tests.parallel.tiny import SIZES, loss_of, tiny_inputs, tiny_model

DEEP = {"depth": 3, "depth_single_blocks": 4}


@pytest.fixture(autouse=True)
def fresh():
    """Graphs of other tests count for none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compiled(**options):
    model, counting = tiny_model(**{**DEEP, **options}).eval(), Counting()
    assert compile_blocks(model, counting) == 2
    return model, counting


LAYOUTS = {
    "half-split": {},
    "fused, interleaved": {"fused_qkv": True, "use_liger_rope": False},
    "written out": {"attn_backend": "math"},
    "automatic": {"attn_backend": "auto"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_one_graph_for_each_kind_of_block(layout):
    model, counting = compiled(**layout)
    plain = tiny_model(**{**DEEP, **layout}).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for step in range(3):
            inputs = tiny_inputs(seed=step)
            tolerance = {"rtol": 1e-5, "atol": 1e-5}  # rotations are written out in real numbers
            assert_close(model(**inputs), plain(**inputs), **tolerance)
    assert counting.graphs == 2, "none for a block, none for a step"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_other_sizes_do_not_add_up():
    """A second number of tokens makes graphs for any number."""
    model, counting = compiled()
    with torch.no_grad():
        for image in (13, 20, 27, 34):
            model(**tiny_inputs(image=image))
    assert counting.graphs == 4


def test_training_recomputes_compiled_blocks():
    """Loss and gradients of the plain model, of blocks that are computed again in the backward pass and of others."""
    model = tiny_model(**DEEP, grad_ckpt_settings=(2, 3)).train()
    plain = copy.deepcopy(model)
    compile_blocks(model, "aot_eager")
    losses = [loss_of(each, tiny_inputs()) for each in (model, plain)]
    assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)  # sums in another order


def test_a_missing_compiler_is_said_before_weights_are_loaded(tiny_config):
    run = PreparedRun.of(load_config({**tiny_config, "compile": True}, InferenceOptions), torch.device("cpu"))
    absent = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.raises(UserError, match=r"compile: kernels for the CPU need a C\+\+ compiler"):
        run.check_resources()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_kernels_of_inductor(tiny_config, caplog):
    """The real thing, on the command line's way: videos of the plain run within fp32's rounding, after fused sums.

    Of single blocks alone, whose kernels are few: a compiler takes seconds for each.
    """
    keys = {"num_steps": 1, "num_frames": 5, "model.depth": 0}
    with caplog.at_level("INFO", logger="opensora"):
        pipe = VideoPipeline.from_config(tiny_config, compile=True, **keys)
    assert "the first step of model" in caplog.text
    made = [each("a cat", seed=1).latents for each in (pipe, VideoPipeline.from_config(tiny_config, **keys))]
    assert not torch.equal(*made), "fused kernels round otherwise: equal numbers mean that nothing was compiled"
    assert_close(*made, rtol=1e-4, atol=1e-4)


def with_adapters(model):
    """LoRA beside the weights, as ``merge_lora=False`` and training have it."""
    torch.manual_seed(0)
    adapter = LoraAdapter(model, {"r": 2, "target_modules": ["proj", "linear2"]}, None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return adapter


def test_adapters_beside_the_weights():
    model, counting = tiny_model(**DEEP).eval(), Counting()
    with_adapters(model)
    plain = copy.deepcopy(model)
    compile_blocks(model, counting)
    with torch.no_grad():
        assert_close(model(**tiny_inputs()), plain(**tiny_inputs()), rtol=1e-5, atol=1e-5)
    assert counting.graphs == 2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_weights(kind):
    """All blocks of a kind still share a graph, in which their weights are unpacked."""
    keys = {**SIZES, **DEEP, "type": "flux", "hidden_size": 64, "axes_dim": [8, 4, 4], "quantize": kind}
    torch.manual_seed(0)
    model, counting = build_module(keys, MODELS).eval(), Counting()
    assert any(isinstance(module, QuantizedLinear) for module in model.single_blocks[0].modules())
    plain = copy.deepcopy(model)
    compile_blocks(model, counting)
    with torch.no_grad():
        for _ in range(2):
            assert_close(model(**tiny_inputs()), plain(**tiny_inputs()), rtol=1e-5, atol=1e-5)
    assert counting.graphs == 2


def test_a_run_with_step_cache_and_kept_modulation(tiny_config, monkeypatch):
    """What changes from step to step (the branches that run, the rows that a cache leaves out) makes few graphs, and
    another run none."""
    monkeypatch.setattr(reuse, "MOST", 1000)  # of so small a model, modulation is smaller than its table
    keys = {"num_steps": 14, "step_cache": 0.3, "sampling_option.text_osci": True}
    pipe, plain = (VideoPipeline.from_config(tiny_config, **keys) for _ in range(2))
    counting = Counting()
    compile_blocks(pipe.models["model"], counting)
    made = [each(["a cat", "a red dog"], seed=[1, 2]) for each in (pipe, plain)]
    assert_close(made[0].latents, made[1].latents, rtol=1e-4, atol=1e-4)
    assert made[0].reused == made[1].reused
    before = counting.graphs
    assert before < 20
    pipe(["a cat", "a red dog"], seed=[1, 2])
    assert counting.graphs == before
