"""The image autoencoder against reference tensors and the released key list."""

import pytest
import torch

from opensora.models.vae.autoencoder_2d import AutoEncoder2D, AutoEncoder2DConfig, build_autoencoder_2d
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors

SMALL = dict(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1, z_channels=4)


@pytest.fixture(scope="module")
def reference(golden):
    """The reference file and our model with its weights."""
    data = golden("flux_ae2d")
    model = AutoEncoder2D(AutoEncoder2DConfig(**data.meta["config"])).eval()
    model.load_state_dict(data.weights, strict=True)
    return data, model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_equals_the_original(reference):
    data, model = reference
    close(model.encode(data.inputs["video"], sample_posterior=False), data.outputs["z_mode"])
    close(model.encode_posterior(data.inputs["video"]).logvar, data.outputs["posterior_logvar"])
    close(model.decode(data.inputs["z"]), data.outputs["decoded"])


@torch.no_grad()
def test_images_are_videos_of_one_frame(reference):
    data, model = reference
    video = data.inputs["video"]
    close(model.encode(video[:, :, 1], sample_posterior=False), data.outputs["z_mode"][:, :, 1])
    close(model.decode(data.inputs["z"][:, :, 0]), data.outputs["decoded"][:, :, 0])


@torch.no_grad()
def test_decodes_the_picture_of_a_whole_sampling_run(golden, reference):
    case = golden("sampling_distill_4step")
    close(reference[1].decode(case.outputs["final_latent"]), case.outputs["decoded"])


def test_released_keys_and_shapes(golden_dir):
    model = build_module({"type": "autoencoder_2d"}, MODELS, device_map="meta")
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    listed = (golden_dir.parent / "reference/keys/keys_ae2d.txt").read_text().splitlines()
    assert sorted(f"{key}\t{shape}" for key, shape in state.items()) == sorted(listed)
    assert len(state) == 244
    assert sum(p.numel() for p in model.parameters()) == 83_819_683


@torch.no_grad()
def test_posterior_is_sampled_as_the_config_and_the_call_say():
    model = build_autoencoder_2d(**SMALL)
    x = torch.randn(1, 3, 2, 16, 16)
    mode = model.encode(x, sample_posterior=False)
    draws = [model.encode(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    quiet = build_autoencoder_2d(**SMALL, sample=False)
    quiet.load_state_dict(model.state_dict())
    assert torch.equal(quiet.encode(x), mode)
    raw = model.encode_posterior(x).mean
    close(model.denormalize(model.normalize(raw)), raw)


@torch.no_grad()
def test_a_scale_for_each_channel():
    scale, shift = [1.0, 2.0, 0.5, 4.0], [0.0, 1.0, -1.0, 0.5]
    plain, scaled = (  # in float64: a random network makes any rounding large
        build_autoencoder_2d(**SMALL | keys).double()
        for keys in (dict(scale_factor=1.0, shift_factor=0.0), dict(scale_factor=scale, shift_factor=shift))
    )
    scaled.load_state_dict(plain.state_dict())
    for shape in [(2, 3, 16, 16), (2, 3, 2, 16, 16)]:
        x = torch.randn(shape, dtype=torch.float64)
        raw, z = (model.encode(x, sample_posterior=False) for model in (plain, scaled))
        for i in range(4):
            torch.testing.assert_close(z[:, i], scale[i] * (raw[:, i] - shift[i]))
        torch.testing.assert_close(scaled.decode(z), plain.decode(raw))


def test_sizes():
    model = build_autoencoder_2d(**SMALL, device_map="meta")
    assert (model.compression, model.is_causal, model.latent_channels) == ((1, 8, 8), False, 4)
    assert model.get_latent_size((3, 64, 72)) == (3, 8, 9)
    x = torch.zeros(2, 3, 3, 64, 72, device="meta")
    reconstruction, posterior, z = model(x, sample_posterior=False)
    assert (reconstruction.shape, posterior.mean.shape, z.shape) == (x.shape, (2, 4, 3, 8, 9), (2, 4, 3, 8, 9))
    assert model.get_last_layer().shape == (3, 32, 3, 3)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match="multiples of 8"):
        build_autoencoder_2d(**SMALL).encode(torch.zeros(1, 3, 12, 16))
    for shape in [(3, 16, 16), (1, 4, 16, 16), (1, 3, 0, 16, 16)]:
        with pytest.raises(UserError, match=r"takes \[B, 3, H, W\] or \[B, 3, T, H, W\]"):
            build_autoencoder_2d(**SMALL).encode(torch.zeros(shape))
    for config, said in [
        (dict(ch=48, ch_mult=[1]), "a level of 48 channels"),
        (dict(ch=32, ch_mult=[1, 0]), r"ae.ch_mult=\[1, 0\]: must be at least 1"),
        (dict(ch=24, ch_mult=[4]), "ch=24, .* a level of 24 channels"),  # the first convolution's
        (dict(z_channels=0), "z_channels=0: must be at least 1"),
        (dict(ch=6, ch_mult=[1], norm_num_groups=4), "a level of 6 channels; .* norm_num_groups=4"),
        (dict(num_res_blocks=0), "num_res_blocks=0: must be at least 1"),
        (dict(**SMALL, scale_factor=[1.0, 2.0]), r"scale_factor .* has 2 numbers: give one, or one per .* \(4\)"),
        (dict(**SMALL, scale_factor=[1.0, 2.0, 0.0, 1.0]), "cannot be divided by 0"),
    ]:
        with pytest.raises(UserError, match=said):
            build_autoencoder_2d(**config)
    model = build_autoencoder_2d(**SMALL)
    path = tmp_path / "ae.safetensors"
    save_safetensors(model.state_dict() | {"discriminator.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"discriminator\.weight"):
        build_autoencoder_2d(str(path), **SMALL)
    loaded = build_autoencoder_2d(str(path), strict_load=False, **SMALL)
    assert torch.equal(loaded.get_last_layer(), model.get_last_layer())
