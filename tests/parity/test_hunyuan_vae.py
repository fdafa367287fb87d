"""The causal VAE against reference tensors, diffusers, and its own plain versions."""

import pytest
import torch
from torch import nn

from opensora.models.hunyuan_vae import blocks
from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D, HunyuanVAEConfig
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.utils.errors import UserError

SMALL = dict(latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16, 16, 32))


@pytest.fixture(scope="module")
def reference(golden):
    """The reference file and our model with its weights."""
    data = golden("hunyuan_vae")
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(**SMALL)).eval()
    model.load_state_dict(data.weights, strict=True)
    return data, model


def close(actual, expected):
    # float32 on CPU: different summation orders stay far below 1e-4 of values around one.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_encode_equals_the_original(reference):
    data, model = reference
    posterior = model.encode_posterior(data.inputs["video"])
    close(posterior.mean, data.outputs["posterior_mean"])
    close(posterior.logvar, data.outputs["posterior_logvar"])
    close(posterior.kl() / data.outputs["kl"], torch.ones(2))
    close(model.encode(data.inputs["video"], sample_posterior=False), data.outputs["z_mode"])
    noisy = model.normalize(posterior.mean + posterior.std * data.inputs["posterior_noise"])
    close(noisy, data.outputs["z_sample_seed123"])
    close(model.encode(data.inputs["image"], sample_posterior=False), data.outputs["image_z"])


@torch.no_grad()
def test_encoder_probes(reference):
    data, model = reference
    hidden = model.encoder.conv_in(data.inputs["video"])
    close(hidden[:, :, 0], data.outputs["enc_conv_in_frame0"])
    close(model.encoder.down_blocks[0](hidden)[:, :, -1], data.outputs["enc_down0_frame_last"])


@torch.no_grad()
def test_decode_equals_the_original(reference):
    data, model = reference
    close(model.decode(data.inputs["z"]), data.outputs["decoded"])
    close(model.decode(data.outputs["image_z"]), data.outputs["image_decoded"])


def test_sampling_is_reproducible(reference):
    data, model = reference
    with torch.no_grad():
        first, second = (
            model.encode(data.inputs["video"], generator=torch.Generator().manual_seed(3)) for _ in range(2)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("kernel_stride", [(3, 1), (3, (2, 2, 2)), (3, (1, 2, 2))])
def test_one_frame_shortcut_equals_the_3d_convolution(kernel_stride):
    conv = blocks.CausalConv3d(3, 5, *kernel_stride).double()
    frame = torch.randn(2, 3, 1, 8, 6, dtype=torch.float64)
    # float64: only the order of three additions differs.
    torch.testing.assert_close(conv(frame), conv._video(frame, 0), atol=1e-12, rtol=1e-12)


# Kernels of one too: the decoder's last shortcut sees 256 x 129 x 256 x 256 elements, more than 2^31.
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, (2, 2, 2)), (1, 1)])
@pytest.mark.parametrize("frames", [5, 9])
def test_convolution_in_pieces_is_exact(monkeypatch, kernel, stride, frames):
    conv = blocks.CausalConv3d(3, 5, kernel, stride).double()
    x = torch.randn(1, 3, frames, 8, 6, dtype=torch.float64)
    whole = conv(x)
    limit = 3 * 10 * 8 * (2 + kernel)
    monkeypatch.setattr(blocks, "INDEX_LIMIT", limit)
    assert conv._frames_per_call(x) < frames
    sizes = []
    conv.conv.register_forward_hook(lambda module, args, out: sizes.append(max(args[0].numel(), out.numel())))
    torch.testing.assert_close(conv(x), whole, atol=1e-12, rtol=1e-12)
    assert len(sizes) > 1
    assert max(sizes) <= limit


@pytest.mark.parametrize("stride", [1, (1, 2, 2)])
@pytest.mark.parametrize("frames", [5, 6, 7, 8, 9])  # whole tiles after the first frame, and every remainder
@pytest.mark.parametrize("contiguous", [True, False])
def test_convolution_in_tiles_equals_the_plain_one(stride, frames, contiguous):
    conv = blocks.CausalConv3d(3, 5, 3, stride).double()
    x = torch.randn(2, 3, frames, 17, 16, dtype=torch.float64)
    x = x if contiguous else x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not conv._tiles_pay(x)  # the plain convolution, since gradients are on
    plain = conv(x).detach()
    with torch.no_grad():
        assert conv._tiles_pay(x)
        # float64: other sums of products, with factors of up to 8.
        torch.testing.assert_close(conv(x), plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frames", [6, 7, 8])
def test_what_tiles_leave_over_is_convolved_in_pieces(monkeypatch, frames):
    conv = blocks.CausalConv3d(5, 5, 3).double()
    x = torch.randn(2, 5, frames, 17, 16, dtype=torch.float64)
    plain = conv(x).detach()
    limit = 2 * 5 * 19 * 18 * 3  # padded elements of three frames, what one output frame takes
    monkeypatch.setattr(blocks, "INDEX_LIMIT", limit)
    sizes = []
    conv.conv.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    with torch.inference_mode():
        torch.testing.assert_close(conv(x), plain, atol=1e-12, rtol=0)
    assert len(sizes) == frames - 5
    assert max(sizes) <= limit


def test_rounding_of_tiles_in_float32():
    conv = blocks.CausalConv3d(64, 8, 3)
    x = torch.randn(1, 64, 9, 16, 16)
    exact = conv.double()(x.double()).detach()
    with torch.no_grad():
        torch.testing.assert_close(conv.float()(x), exact.float(), atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_tiles_are_for_float32_on_cpu(change):
    conv = blocks.CausalConv3d(3, 5, 3).to(**change)
    assert not conv._tiles_pay(torch.zeros(1, 3, 9, 16, 16, **change))


@torch.no_grad()
def test_no_tiles_under_autocast():
    conv, x = blocks.CausalConv3d(3, 5, 3), torch.randn(1, 3, 9, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv._tiles_pay(x)
        assert torch.equal(conv(x), conv._video(x, 0))


def test_residual_block_without_gradients_changes_nothing():
    block = blocks.ResnetBlockCausal3D(4, 8, 2).double()
    x = torch.randn(2, 4, 6, 17, 16, dtype=torch.float64)
    given, plain = x.clone(), block(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain, atol=1e-12, rtol=0)
    assert torch.equal(x, given)  # what works in place leaves the input alone


@pytest.mark.parametrize("scale", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("limit", [blocks.INDEX_LIMIT, 2 * 5 * 9 * 8 * 4])
def test_upsampling_by_phases_equals_enlarging_first(monkeypatch, scale, limit):
    layer = blocks.UpsampleCausal3D(5, scale).double()
    x = torch.randn(2, 5, 5, 7, 6, dtype=torch.float64)
    plain = layer(x).detach()  # gradients are on: the plain path
    monkeypatch.setattr(blocks, "INDEX_LIMIT", limit)
    with torch.no_grad():
        # float64: taps are added up before rather than after the multiplication.
        torch.testing.assert_close(layer(x), plain, atol=1e-13, rtol=1e-13)


def masked_attention(module: blocks.FrameCausalAttention, x):
    """The same attention with the dense frame-causal mask."""
    _, channels, frames, height, width = x.shape
    tokens = module.group_norm(x.flatten(2)).transpose(1, 2)
    frame = torch.arange(frames).repeat_interleave(height * width)
    visible = frame[None, :] <= frame[:, None]
    logits = module.to_q(tokens) @ module.to_k(tokens).transpose(1, 2) / channels**0.5
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    out = module.to_out[0](weights @ module.to_v(tokens))
    return x + out.transpose(1, 2).reshape(x.shape)


def test_frame_causal_attention_equals_a_dense_mask():
    module = blocks.FrameCausalAttention(8, 2).double()
    x = torch.randn(2, 8, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    plain, ours = masked_attention(module, x), module(x)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    probe = torch.randn_like(plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, probe)[0], torch.autograd.grad(plain, x, probe)[0], atol=1e-11, rtol=1e-11
    )


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(**SMALL)).double().train()
    x = torch.randn(1, 3, 5, 16, 16, dtype=torch.float64)
    losses, grads = [], []
    for enabled in (False, True):
        model.set_grad_checkpoint(enabled)
        loss = model(x, sample_posterior=False)[0].square().mean()
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, model.encoder.conv_in.conv.weight)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


def test_per_channel_scale_and_shift_invert():
    config = HunyuanVAEConfig(**SMALL, scale_factor=[0.5, 1.0, 2.0, 4.0], shift_factor=[0.1, 0.2, 0.3, 0.4])
    model = AutoencoderKLCausal3D(config)
    raw = torch.randn(2, 4, 3, 2, 2)
    z = model.normalize(raw)
    torch.testing.assert_close(z[:, 3], 4.0 * (raw[:, 3] - 0.4))
    torch.testing.assert_close(model.denormalize(z), raw)


def test_bad_sizes_are_named():
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(**SMALL))
    with pytest.raises(UserError, match="4k\\+1: use 5 or 9"):
        model.encode(torch.zeros(1, 3, 6, 16, 16))
    with pytest.raises(UserError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 5, 12, 16))
    with pytest.raises(UserError, match="scale_factor has 2"):
        HunyuanVAEConfig(**SMALL, scale_factor=[1.0, 2.0])
    with pytest.raises(UserError, match="norm_num_groups"):
        HunyuanVAEConfig(block_out_channels=(8, 16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": []}, "block_out_channels is empty"),
        ({"block_out_channels": [32, 32]}, "spatial_compression_ratio=8: .* 2 levels .* at most 4"),
        ({"spatial_compression_ratio": 6}, "spatial_compression_ratio=6: must be a power of 2"),
        ({"time_compression_ratio": 16}, "time_compression_ratio=16: .* at most 8"),
        ({"norm_num_groups": 0}, "norm_num_groups=0: must be at least 1"),
        ({"layers_per_block": 0}, "layers_per_block=0: must be at least 1"),
        ({"scale_factor": 0}, "scale_factor=0"),
        ({"scale_factor": [1.0, 0.0] * 8}, "scale_factor=.*by 0"),
        ({"block_out_channels": [32, 32, 0, 32]}, r"block_out_channels=\[32, 32, 0, 32\]: must be at least 1"),
        ({"in_channels": 0}, "in_channels=0: must be at least 1"),
        ({"dropout": 1}, "dropout=1: must be at least 0 and below 1"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(UserError, match=rf"ae\.{message}"):
        HunyuanVAEConfig(**fields)


@pytest.mark.parametrize("shape", [(3, 5, 16, 16), (1, 4, 5, 16, 16), (1, 3, 0, 16, 16)])
def test_clips_of_another_shape_are_named(shape):
    model = AutoencoderKLCausal3D(HunyuanVAEConfig(block_out_channels=(32,) * 4))
    with pytest.raises(UserError, match=r"takes \[B, 3, T, H, W\] with a frame or more"):
        model.encode(torch.zeros(shape))


def test_posterior_clamps_its_log_variance():
    moments = torch.cat([torch.zeros(1, 2, 1, 1, 1), torch.full((1, 2, 1, 1, 1), 100.0)], dim=1)
    assert DiagonalGaussian(moments).logvar.max() == 20.0
    assert isinstance(AutoencoderKLCausal3D(HunyuanVAEConfig(**SMALL)).get_last_layer(), nn.Parameter)
