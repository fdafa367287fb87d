"""Wider decoders that decode as before: tools/convert/widen_decoder.py."""

import pytest
import torch
from safetensors.torch import load_file

from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D
from opensora.models.hunyuan_vae.config import HunyuanVAEConfig
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors
from tools.convert import widen_decoder
from tools.convert.autoencoders import video_description

NARROW = dict(latent_channels=4, layers_per_block=1, norm_num_groups=2, block_out_channels=[4, 4, 8, 8])
WIDE = [8, 4, 16, 24]  # twice, once, twice and three times as wide


@pytest.fixture
def narrow(tmp_path):
    """A narrow autoencoder with random weights, biases and norms in float64, and its file."""
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(**NARROW)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    save_safetensors(model.state_dict(), tmp_path / "narrow.safetensors")
    return model, tmp_path / "narrow.safetensors"


def widen(path, *more):
    out = path.with_name("wide.safetensors")
    widen_decoder.main([str(path), str(out), "--norm-groups", "2", *more])
    return out


def test_whole_multiples_decode_as_before(narrow):
    model, path = narrow
    wide = AutoencoderKLCausal3D(HunyuanVAEConfig(**NARROW, decoder_block_out_channels=WIDE)).double().eval()
    state = load_file(widen(path, "--channels", *map(str, WIDE)))
    # The file keeps float64; widening works in float32, whose rounding is all that may differ.
    wide.load_state_dict(state)
    z = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, decoded = model.decode(z), wide.decode(z)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        for key, value in getattr(model, name).state_dict().items():
            assert torch.equal(state[f"{name}.{key}"].float(), value.float())
    # Copies of a channel are not left equal: they would be trained alike for ever.
    wide.decode(z).square().mean().backward()
    gradient = wide.decoder.up_blocks[3].resnets[0].conv1.conv.weight.grad
    first, copy = gradient[0], gradient[2]
    assert (first - copy).norm() > 0.01 * first.norm()


def test_what_does_not_fit_is_named(narrow):
    _, path = narrow
    for channels, said in [
        (["8", "8", "8"], "must have 4 numbers"),
        (["8", "8", "4", "8"], "4 is less than the 8 that there are"),
        (["8", "8", "8", "8"], "8 twice, in place of 4 and 8"),
        (["8", "8", "9", "8"], "9 channels; every level needs a multiple"),
    ]:
        with pytest.raises(UserError, match=said):
            widen(path, "--channels", *channels)
    assert not path.with_name("wide.safetensors").exists()


def test_diffusers_has_no_place_for_it():
    config = HunyuanVAEConfig(**NARROW, decoder_block_out_channels=WIDE)
    with pytest.raises(UserError, match="equal widths on both sides"):
        video_description(config)
