"""Weight files of the wrong kind or size: autoencoders say what the file is and which config key to change."""

import pytest

from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors

STAGES = {"width_list": [32] * 6, "depth_list": [1] * 6}
SMALL = {
    "hunyuan_vae": {"block_out_channels": [32] * 4, "latent_channels": 4},
    "dc_ae": {"from_scratch": True, "latent_channels": 16, "encoder": STAGES, "decoder": STAGES},
    "autoencoder_2d": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4},
}


def build(kind, **changes):
    return build_module({"type": kind, **SMALL[kind], **changes}, MODELS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One weight file of each kind."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in SMALL:
        save_safetensors(build(kind).state_dict(), folder / f"{kind}.safetensors")
    return {kind: str(folder / f"{kind}.safetensors") for kind in SMALL}


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.parametrize("other", list(SMALL))
def test_files_of_another_kind_are_named(files, kind, other):
    if kind == other:
        build(kind, from_pretrained=files[kind])
        return
    with pytest.raises(UserError, match=rf"\(type='{other}'\), not an? .*: check ae.from_pretrained and ae.type"):
        build(kind, from_pretrained=files[other])


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("hunyuan_vae", {"latent_channels": 8}, "ae.latent_channels=4"),
        ("hunyuan_vae", {"block_out_channels": [32, 32, 32, 64]}, "ae.block_out_channels=[32, 32, 32, 32]"),
        ("hunyuan_vae", {"layers_per_block": 1}, "ae.layers_per_block=2"),
        ("hunyuan_vae", {"mid_block_add_attention": False}, "ae.mid_block_add_attention=True"),
        ("dc_ae", {"latent_channels": 32}, "ae.latent_channels=16"),
        ("dc_ae", {"encoder": {**STAGES, "depth_list": [2] * 6}}, "ae.encoder.depth_list=[1, 1, 1, 1, 1, 1]"),
        ("autoencoder_2d", {"z_channels": 8}, "ae.z_channels=4"),
        ("autoencoder_2d", {"ch": 64}, "ae.ch=32"),
        ("autoencoder_2d", {"ch_mult": [1, 2]}, "ae.ch_mult=[1, 1]"),
        ("autoencoder_2d", {"num_res_blocks": 2}, "ae.num_res_blocks=1"),
    ],
)
def test_another_size_names_the_key(files, kind, changes, said):
    with pytest.raises(UserError) as error:
        build(kind, from_pretrained=files[kind], **changes)
    assert f"set {said}." in str(error.value)


def test_a_prefix_before_every_name_is_named(tmp_path):
    state = {f"module.{key}": value for key, value in build("hunyuan_vae").state_dict().items()}
    save_safetensors(state, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"begin with 'module\.'"):
        build("hunyuan_vae", from_pretrained=str(tmp_path / "vae.safetensors"))
