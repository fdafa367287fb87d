"""Weights as folders of diffusers and back: bit by bit, and diffusers computes what we do."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opensora.models.hunyuan_vae import HunyuanVAEConfig
from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.vae.autoencoder_2d import AutoEncoder2D
from opensora.models.vae.config import AutoEncoder2DConfig
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors
from tools.convert import from_diffusers, to_diffusers

diffusers = pytest.importorskip("diffusers")
FLUX = dict(
    in_channels=16, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=4.0, num_heads=2, depth=2,
    depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, qkv_bias=True, guidance_embed=True, cond_embed=False,
)  # fmt: skip
AXES = ["--axes-dim", "4", "6", "6"]
CLOSE = dict(rtol=0, atol=2e-5)  # fp32 kernels add up in another order; outputs are of size 1


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight[0].numel() if weight.ndim > 1 else 25
            noise = torch.randn(weight.shape, generator=generator) * fan_in**-0.5
            weight.copy_(noise + 1 if weight.ndim == 1 and "norm" in name and name.endswith("weight") else noise)
    return model.eval().requires_grad_(False)


def there_and_back(model, tmp_path, flags=(), back=(), metadata=None):
    """Convert a model's weights, and return the folder; they come back as they were."""
    first, folder, last = tmp_path / "first.safetensors", tmp_path / "folder", tmp_path / "last.safetensors"
    save_safetensors(model.state_dict(), first, metadata)
    to_diffusers.main([str(first), str(folder), *flags])
    from_diffusers.main([str(folder), str(last), *back])
    before, after = load_file(first), load_file(last)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    return folder


@pytest.mark.parametrize(("fused", "half_split"), [(True, False), (False, False), (True, True), (False, True)])
def test_flux(tmp_path, fused, half_split):
    ours = randomised(MMDiTModel(MMDiTConfig(**FLUX, fused_qkv=fused, use_liger_rope=half_split)))
    back = ["--qkv", "fused" if fused else "split", "--rope", "half-split" if half_split else "interleaved"]
    folder = there_and_back(ours, tmp_path, AXES, back, {"use_liger_rope": str(half_split)})
    theirs, info = diffusers.FluxTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).float()
    img, txt, vec, t, g = (
        *(torch.randn(*s) for s in ((1, 6, 16), (1, 4, 12), (1, 8))),
        torch.tensor([0.5]),
        torch.ones(1),
    )
    with torch.no_grad():
        result = theirs(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=vec, timestep=t, guidance=g, img_ids=ids,
            txt_ids=torch.zeros(4, 3), return_dict=False,
        )[0]  # fmt: skip
    expected = ours(
        img=img, img_ids=ids[None], txt=txt, txt_ids=torch.zeros(1, 4, 3), timesteps=t, y_vec=vec, guidance=g
    )
    torch.testing.assert_close(result, expected, **CLOSE)


def test_image_autoencoder(tmp_path):
    sizes = dict(ch=8, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=4, norm_num_groups=4)
    config = AutoEncoder2DConfig(**sizes, scale_factor=0.5)
    ours = randomised(AutoEncoder2D(config))
    folder = there_and_back(ours, tmp_path, ["--scale-factor", "0.5", "--norm-groups", "4"])
    theirs, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (0.5, config.shift_factor)
    image = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    with torch.no_grad():
        raw = theirs.encode(image).latent_dist.mode()
        decoded = theirs.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(raw, ours.encode_posterior(image).mode(), **CLOSE)
    torch.testing.assert_close(decoded, ours.decode(ours.normalize(raw)), **CLOSE)
    theirs.save_pretrained(tmp_path / "whole" / "vae")  # as a pipeline keeps it
    out = tmp_path / "again.safetensors"
    from_diffusers.main([str(tmp_path / "whole"), str(out), "--part", "vae"])
    assert all(torch.equal(value, load_file(out)[name]) for name, value in ours.state_dict().items())


def test_video_autoencoder(tmp_path, capsys):
    sizes = dict(latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=[8, 8, 8, 8])
    ours = randomised(AutoencoderKLCausal3D(HunyuanVAEConfig(**sizes)))
    folder = there_and_back(ours, tmp_path, ["--norm-groups", "4"])
    assert "ae.type=hunyuan_vae, ae.scale_factor=0.476986" in capsys.readouterr().out
    theirs, info = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    video = torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    with torch.no_grad():
        raw = theirs.encode(video).latent_dist.mode()
        decoded = theirs.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(raw, ours.encode_posterior(video).mode(), **CLOSE)
    torch.testing.assert_close(decoded, ours.decode(ours.normalize(raw)), **CLOSE)


def test_what_does_not_fit_is_refused(tmp_path):
    video, folder, out = tmp_path / "video.safetensors", tmp_path / "folder", str(tmp_path / "out.safetensors")
    save_safetensors(MMDiTModel(MMDiTConfig(**{**FLUX, "cond_embed": True})).state_dict(), video)
    with pytest.raises(UserError, match=r"video\.safetensors: it is a video model"):
        to_diffusers.main([str(video), str(folder)])
    image = tmp_path / "image.safetensors"
    save_safetensors(MMDiTModel(MMDiTConfig(**FLUX)).state_dict(), image)
    with pytest.raises(UserError, match="rotary layout is not recorded: give --from-rope"):
        to_diffusers.main([str(image), str(folder), *AXES])
    with pytest.raises(UserError, match="give --axes-dim"):
        to_diffusers.main([str(image), str(folder), "--from-rope", "interleaved"])
    assert not folder.exists()
    to_diffusers.main([str(image), str(folder), *AXES, "--from-rope", "interleaved"])
    with pytest.raises(UserError, match=r"config\.json exists; choose another folder or give --overwrite"):
        to_diffusers.main([str(image), str(folder), *AXES, "--from-rope", "interleaved"])
    old = {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(1), "quant_conv.weight": torch.ones(1)}
    save_safetensors(old, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=r"it has quant_conv\.weight, which the image autoencoder of FLUX\.1"):
        from_diffusers.main([str(tmp_path / "old.safetensors"), out])
    with pytest.raises(UserError, match="--qkv and --rope are for transformers"):
        from_diffusers.main([str(tmp_path / "old.safetensors"), out, "--qkv", "split"])
    with pytest.raises(UserError, match="has no folder vae"):
        from_diffusers.main([str(folder), out, "--part", "vae"])
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "FluxTransformer2DModel"


def test_a_whole_pipeline(tmp_path, capsys):
    folder, out = tmp_path / "pipeline", str(tmp_path / "out.safetensors")
    words = ["demo", str(folder), "--pipeline", "--license", "apache-2.0", "--dtype", "bf16"]
    to_diffusers.main(words)
    assert "a pipeline, load with diffusers.DiffusionPipeline" in capsys.readouterr().out
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="holds a pipeline"):
        to_diffusers.main(words)
    with pytest.raises(UserError, match="--axes-dim is for a single model"):
        to_diffusers.main([*words, *AXES])
    with pytest.raises(UserError, match="--license is for --pipeline"):
        to_diffusers.main([out, str(folder), "--license", "mit"])
    with pytest.raises(UserError, match="is a pipeline of opensora: give the folder itself"):
        from_diffusers.main([str(folder), out])
