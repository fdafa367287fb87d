"""Building modules from config sections."""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from opensora.config.options import ModelOptions
from opensora.config.registries import Entry
from opensora.models.mmdit import MMDiTConfig
from opensora.registry import DATASETS, MODELS, LazyRegistry, build_module
from opensora.utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registry() -> LazyRegistry:
    """A registry of its own, so that tests leave nothing in the package's."""
    registry = LazyRegistry("toy", {}, ModelOptions)

    @registry.register_module("square")
    class Square(nn.Module):
        def __init__(self, width: int, tags: list | None = None, scale: float = 1.0) -> None:
            super().__init__()
            self.width, self.tags, self.scale = width, tags, scale

    registry.register_module("flux", module=lambda config, torch_dtype=None: (config, torch_dtype), config=MMDiTConfig)
    registry.register_module("anything", module=lambda **rest: rest)
    return registry


def test_none_and_modules_pass_through(registry):
    module = nn.Linear(1, 1)
    assert build_module(None, registry) is None
    assert build_module(module, registry) is module


def test_overrides_win_and_the_section_stays_as_it_was(registry):
    cfg = {"type": "square", "width": 2, "tags": ["a"]}
    before = copy.deepcopy(cfg)
    built = build_module(cfg, registry, width=3, scale=0.5)
    built.tags.append("b")
    assert (built.width, built.scale) == (3, 0.5)
    assert cfg == before


@pytest.mark.parametrize("wrong", ["square", 3, [("type", "square")]])
def test_other_inputs_are_type_errors(registry, wrong):
    with pytest.raises(TypeError, match="expected a dict"):
        build_module(wrong, registry)


def test_unknown_type_names_the_nearest(registry):
    with pytest.raises(UserError, match=r"'squaer'.*'square'"):
        build_module({"type": "squaer"}, registry)
    with pytest.raises(UserError, match="hunyuan_vae"):
        build_module({"type": "hunyuan_vea"}, MODELS)
    with pytest.raises(UserError, match=r"type 3 is not a registered .*square"):
        build_module({"type": 3}, registry)


def test_missing_type_lists_the_names(registry):
    with pytest.raises(UserError, match=r"no `type`.*square"):
        build_module({"width": 2}, registry)


def test_unknown_argument_names_the_nearest(registry):
    with pytest.raises(UserError, match="'square' takes no argument 'widht'; did you mean 'width'"):
        build_module({"type": "square", "widht": 2}, registry)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"type": "flux", "hidden_size": "32"}, r"'flux': hidden_size = '32': expected integer"),
        ({"type": "flux", "depth": 1.5}, r"'flux': depth = 1.5: expected integer"),
        ({"type": "flux", "qkv_bias": "no"}, "'flux': qkv_bias = 'no': expected true or false"),
        ({"type": "hunyuan_vae", "block_out_channels": 128}, "block_out_channels = 128: expected list of integer"),
        ({"type": "hunyuan_vae", "scale_factor": None}, "scale_factor = None: expected number or list of number"),
        ({"type": "dc_ae", "encoder": [32, 32]}, r"encoder = \[32, 32\]: expected a section"),
        ({"type": "text_embedder", "from_pretrained": "x", "max_length": "16"}, "max_length = '16': expected integer"),
    ],
)
def test_values_of_another_type_are_named(section, said):
    with pytest.raises(UserError, match=said):
        build_module(section, MODELS, device_map="meta")


def test_whole_numbers_may_be_written_as_floats():
    vae = build_module({"type": "hunyuan_vae", "block_out_channels": (32.0,) * 4}, MODELS, device_map="meta")
    assert vae.config.block_out_channels == [32] * 4


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("width_list", "did you mean 'encoder.width_list'"),
        ("temporal_upsample", "did you mean 'decoder.temporal_upsample'"),
        ("scale_factor", "did you mean 'scaling_factor'"),
        ("time_compression_ratio", "it takes cache_dir"),
        ("foo", "it takes cache_dir"),
    ],
)
def test_keys_of_a_sections_own_sections_are_near(key, near):
    with pytest.raises(UserError, match=f"'dc_ae' takes no argument '{key}'; {near}"):
        build_module({"type": "dc_ae", key: 1}, MODELS)


SIZES = {
    "hidden_size": 8,
    "num_heads": 1,
    "axes_dim": [4, 2, 2],
    "depth": 1,
    "depth_single_blocks": 1,
    "in_channels": 4,
}
REST = {
    "in_channels": 4,
    "vec_in_dim": 4,
    "context_in_dim": 4,
    "mlp_ratio": 1,
    "theta": 10,
    "qkv_bias": True,
    "guidance_embed": False,
}


def test_a_factory_gets_its_option_group(registry):
    config, dtype = build_module({"type": "flux", **SIZES, **REST}, registry, torch_dtype="half", patch_size=1)
    assert isinstance(config, MMDiTConfig)
    assert (config.type, config.hidden_size, config.mlp_ratio, config.patch_size, dtype) == ("flux", 8, 1.0, 1, "half")
    with pytest.raises(UserError, match="'detph'; did you mean 'depth'"):
        build_module({"type": "flux", "hidden_size": 8, "detph": 1}, registry)
    with pytest.raises(UserError, match="'flux'.theta, 'flux'.qkv_bias, 'flux'.guidance_embed must be given"):
        build_module(
            {"type": "flux", **SIZES, "in_channels": 4, "vec_in_dim": 4, "context_in_dim": 4, "mlp_ratio": 1}, registry
        )
    with pytest.raises(UserError, match="'flux': depth=-1: must be at least 0"):
        build_module({"type": "flux", **SIZES, **REST, "depth": -1}, registry)
    assert build_module({"type": "anything", "goes": 1}, registry) == {"goes": 1}


def test_shipped_names():
    assert set(MODELS.names) >= {
        *("flux", "hunyuan_vae", "dc_ae", "autoencoder_2d", "text_embedder", "N_Layer_discriminator_3D")
    }
    assert set(DATASETS.names) >= {"text", "video_text", "cached_video_text"}


@pytest.mark.parametrize("name", sorted(MODELS.entries))
def test_factories_take_their_option_group(name):
    registry = MODELS if name in MODELS.entries else DATASETS
    group = registry.config_of(name)
    assert issubclass(group, registry.base)
    parameters = [*inspect.signature(registry.resolve(name)).parameters]
    assert parameters[0] == "config"
    if registry is MODELS:
        assert {"device_map", "torch_dtype"} <= set(parameters)


def test_a_listed_type_without_code():
    registry = LazyRegistry(
        "toy",
        {"gone": Entry("opensora.models.gone", "", ("x",)), "empty": Entry("opensora.utils.errors", "", ("x",))},
        ModelOptions,
    )
    for name in ("gone", "empty"):
        with pytest.raises(UserError, match=f"'{name}' is not part of this version"):
            registry.resolve(name)


def test_a_name_imports_its_own_module_only():
    code = (
        "import sys; from opensora.registry import MODELS; MODELS.resolve('hunyuan_vae');"
        "others = ('opensora.models.mmdit', 'opensora.models.dc_ae', 'opensora.datasets');"
        "print([m for m in sys.modules if m.startswith(others)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
