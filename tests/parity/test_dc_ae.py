"""The deep-compression autoencoder against reference tensors and the released key list, and its parts by themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opensora.models.dc_ae import blocks, build_dc_ae
from opensora.registry import MODELS, build_module
from opensora.utils import weights, weights_writing
from opensora.utils.errors import UserError

SMALL = dict(
    latent_channels=16,
    encoder=dict(width_list=[8, 8, 16, 32, 32, 32], depth_list=[1] * 6),
    decoder=dict(width_list=[8, 8, 16, 32, 32, 32], depth_list=[1] * 6),
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def layout_of(dotlist: str) -> dict:
    """The sections ``encoder`` and ``decoder`` and the latent width that a reference file was made with."""

    def value(text):
        if text.startswith("["):
            return [value(part) for part in text[1:-1].split(",")]
        return int(text) if text.isdigit() else {"True": True, "False": False}.get(text, text)

    layout: dict = {"encoder": {}, "decoder": {}}
    for item in dotlist.split():
        key, text = item.split("=")
        section, _, name = key.partition(".")
        if name:
            layout[section][name] = value(text)
        elif key == "latent_channels":
            layout[key] = value(text)
    return layout


@pytest.fixture(scope="module")
def build(golden):
    """Our model with the weights of the reference, given the tiling options."""

    def with_options(**options):
        data = golden("dcae")
        model = build_dc_ae(**layout_of(data.meta["dotlist"]), **options).eval()
        model.load_state_dict(data.weights, strict=True)
        return model

    return with_options


@torch.no_grad()
def test_equals_the_original(golden, build):
    data, model = golden("dcae"), build()
    close(model.encode(data.inputs["video"]), data.outputs["z"])
    close(model.decode(data.inputs["z"]), data.outputs["decoded"])
    hidden = model.encoder.project_in(data.inputs["video"])
    for stage in model.encoder.stages[:4]:
        hidden = stage(hidden)
    close(hidden, data.outputs["enc_after_stage3"])


@torch.no_grad()
def test_one_frame_equals_the_original(golden, build):
    data, model = golden("dcae"), build()
    close(model.encode(data.inputs["image"]), data.outputs["image_z"])
    close(model.decode(data.outputs["image_z"]), data.outputs["image_decoded"])


@torch.no_grad()
@pytest.mark.parametrize("which", ["spatial", "both", "temporal_tail1"])
def test_tiled_equals_the_original(golden, build, which):
    data = golden(f"dcae_tiled_{which}")
    model = build(**data.meta["overrides"])
    assert [model.config.tiling().latent_tile(dim) for dim in (3, 2)] == data.meta["latent_tile"]
    close(model.encode(data.inputs["video"]), data.outputs["z_tiled"])
    close(model.decode(data.inputs["z"]), data.outputs["decoded_tiled"])


@torch.no_grad()
def test_decodes_the_video_of_a_whole_sampling_run(golden, build):
    case = golden("sampling_highcomp_t2v_4step")
    close(build().decode(case.outputs["final_latent"]), case.outputs["decoded"])


@torch.no_grad()
def test_half_precision_stays_near(golden, build):
    data, model = golden("dcae"), build().bfloat16()
    z = model.encode(data.inputs["video"].bfloat16()).float()
    assert (z - data.outputs["z"]).abs().max() <= 3e-2 * data.outputs["z"].abs().max()


def test_released_keys_and_shapes(golden_dir):
    model = build_module({"type": "dc_ae", "model_name": "dc-ae-f32t4c128"}, MODELS, device_map="meta")
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    listed = (golden_dir.parent / "reference/keys/keys_dc.txt").read_text().splitlines()
    assert sorted(f"{key}\t{shape}" for key, shape in state.items()) == sorted(listed)
    assert len(state) == 339
    assert sum(p.numel() for p in model.parameters()) == 459_462_147


@torch.no_grad()
def test_samples_do_not_depend_on_their_batch_and_scale_inverts():
    model = build_dc_ae(**SMALL, scaling_factor=0.5).eval()
    plain = build_dc_ae(**SMALL, is_training=True, scaling_factor=0.5).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4, 32, 32)
    z = model.encode(x)
    assert torch.equal(z[1:], model.encode(x[1:]))
    torch.testing.assert_close(z, plain.encode(x) / 0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(z), plain.decode(z * 0.5), atol=1e-4, rtol=1e-4)


def test_sizes():
    model = build_dc_ae(**SMALL, device_map="meta")
    assert (model.compression, model.is_causal, model.latent_channels) == ((4, 32, 32), False, 16)
    assert model.get_latent_size((128, 192, 320)) == (32, 6, 10)
    assert model.get_latent_size((1, 64, 64)) == (1, 2, 2)
    reconstruction, posterior, z = model(torch.zeros(2, 3, 8, 32, 64, device="meta", dtype=torch.bfloat16))
    assert (reconstruction.shape, reconstruction.dtype, posterior) == ((2, 3, 8, 32, 64), torch.bfloat16, None)
    assert z.shape == (2, 16, 2, 1, 2)
    assert model.get_last_layer().shape == (3, 8, 3, 3, 3)


def test_sizes_that_do_not_fit_are_named():
    model = build_dc_ae(**SMALL, device_map="meta")
    for frames, nearest in ((2, "use 1 or 4"), (5, "use 4 or 8"), (129, "use 128 or 132")):
        with pytest.raises(UserError, match=f"{frames} frames do not fit.*{nearest}"):
            model.encode(torch.zeros(1, 3, frames, 32, 32, device="meta"))
    with pytest.raises(UserError, match="32x100 pixels.*nearest: 32x96"):
        model.encode(torch.zeros(1, 3, 4, 32, 100, device="meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_name="dc-ae-f64"), "known: dc-ae-f32t4c128"),
        (dict(latent_channels=48), "latent_channels=48 does not divide 1024"),
        (dict(encoder=dict(width_list=[8, 8])), "width_list 2, depth_list 6"),
        (dict(encoder=dict(width_list=[8, 8, 16, 24, 32, 32])), "24 channels; attention stages need multiples of 32"),
        (dict(decoder=dict(depth_list=[1, 1, 0, 1, 1, 1])), "at least one block"),
        (dict(decoder=dict(block_type="Res")), "'Res' is not known; use ResBlock"),
        (dict(decoder=dict(depth=3)), "ae.decoder.depth is not known; did you mean 'depth_list'"),
        (dict(decoder=dict(channels=3)), "ae.decoder.channels is not known; changeable: width_list"),
        (dict(encoder=dict(temporal_upsample=[False] * 6)), "did you mean 'temporal_downsample'"),
        (dict(encoder=dict(depth_list=[1.5] * 6)), r"depth_list = \[1.5, .* expected list of integer"),
        (dict(encoder=dict(width_list="32")), "width_list = '32': expected list of integer"),
        (dict(encoder=dict(width_list=[0] * 6)), "at least one channel"),
        (dict(latent_channels=0), "latent_channels=0 does not divide 1024"),
        (dict(encoder=dict(norm="bn3d")), "only 'rms3d'"),
        (dict(encoder=dict(temporal_downsample=[False] * 6)), "make them equal"),
        (dict(use_temporal_tiling=True, temporal_tile_size=4), "temporal_tile_size=4: .* give 8 or more"),
        (dict(use_spatial_tiling=True, spatial_tile_size=100), "spatial tiles of 100 must be a multiple of 32"),
    ],
)
def test_layouts_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_dc_ae(device_map="meta", **options)


def test_one_block_type_for_all_stages():
    changed = {"width_list": [32] * 6, "depth_list": [1] * 6, "block_type": "EViTS5_GLU"}
    model = build_dc_ae(device_map="meta", latent_channels=16, encoder=changed, decoder=changed)
    assert not any(isinstance(module, blocks.ConvPair) for module in model.modules())


def test_released_weights_come_from_the_hub_unless_the_layout_is_another(monkeypatch, tmp_path):
    asked = []

    def refuse(path, cache_dir=None):
        asked.append((path, cache_dir))
        raise UserError("offline")

    monkeypatch.setattr(weights, "resolve_path", refuse)
    build_dc_ae(**SMALL)
    build_dc_ae(device_map="meta")
    assert asked == []
    with pytest.raises(UserError, match="offline"):
        build_dc_ae(cache_dir="cache")
    assert asked == [("hpcai-tech/Open-Sora-v2-Video-DC-AE/F32T4C128_AE.safetensors", "cache")]


def test_weights_are_loaded_strictly(tmp_path):
    model = build_dc_ae(**SMALL)
    path = tmp_path / "dc.safetensors"
    weights_writing.save_safetensors(model.state_dict(), path)
    loaded = build_dc_ae(from_pretrained=str(path), from_scratch=True, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    with pytest.raises(UserError, match=r"project_out\.main"):
        build_dc_ae(from_pretrained=str(path), **SMALL | {"latent_channels": 32})


@pytest.mark.parametrize(("temporal", "frames"), [(False, 4), (True, 4), (True, 1)])
def test_shortcuts_invert_each_other(temporal, frames):
    x = torch.randn(2, 3, frames, 4, 6)
    factor = (2 if temporal and frames > 1 else 1, 2, 2)
    folded = blocks.space_to_channel(x, factor)
    assert torch.equal(blocks.channel_to_space(folded, factor), x)
    if factor[0] == 1:
        assert torch.equal(folded[:, :, 0], F.pixel_unshuffle(x[:, :, 0], 2))


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 4), (5, 4)])
def test_convolution_of_one_frame_and_in_pieces_is_exact(monkeypatch, stride, size, groups):
    conv = nn.Conv3d(4, 8, size, stride, size // 2, groups=groups).double()
    image, video = torch.randn(2, 4, 1, 6, 8).double(), torch.randn(2, 4, 12, 6, 8).double()
    torch.testing.assert_close(blocks.convolve(conv, image), conv(image), atol=1e-12, rtol=1e-12)
    whole = conv(video)
    torch.testing.assert_close(blocks.convolve(conv, video), whole)
    for limit in (1, 4_500):
        monkeypatch.setattr(blocks, "INDEX_LIMIT", limit)
        assert blocks._frames_per_call(conv, video) < whole.shape[2]
        torch.testing.assert_close(blocks.convolve(conv, video), whole, atol=1e-12, rtol=1e-12)


def test_linear_attention_equals_its_formula():
    q, k, v = (torch.randn(2, 3, 5, 7, dtype=torch.float64) for _ in range(3))
    weight = torch.einsum("bhdn,bhdm->bhnm", q.relu(), k.relu())
    expected = torch.einsum("bhnm,bhdm->bhdn", weight / (weight.sum(-1, keepdim=True) + 1e-15), v)
    torch.testing.assert_close(blocks.linear_attention(q, k, v), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # stays in float32
        narrow = blocks.linear_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(narrow, expected.float(), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = build_dc_ae(**SMALL, is_training=True, disc_off_grad_ckpt=True).double().train()
    x = torch.randn(1, 3, 8, 32, 32, dtype=torch.float64)
    losses, grads = [], []
    for enabled in (False, True):
        model.set_grad_checkpoint(enabled)
        losses.append(model(x)[0].square().mean())
        grads.append(torch.autograd.grad(losses[-1], model.encoder.project_in.conv.weight)[0])
    assert model.decoder.grad_checkpoint_output is False
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
