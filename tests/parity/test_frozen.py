"""Numbers of our own, frozen when the reference tensors were matched: they guard a checkout that has no others.

Weights and inputs are drawn from seeded generators and not stored; of large outputs every 17th value is. After a wanted
change ``python tests/parity/test_frozen.py`` freezes anew (the tests against reference tensors must pass first). The
MMDiT has such numbers in test_mmdit.py.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora.datasets.aspect import get_image_size
from opensora.diffusion import flow
from opensora.diffusion.conditions import CONDITIONS, build_condition, get_spans
from opensora.diffusion.guidance import Branch, Guidance, step_weights
from opensora.diffusion.latents import get_noise, pack, prepare_ids, unpack
from opensora.models.dc_ae import build_dc_ae
from opensora.models.hunyuan_vae import build_hunyuan_vae
from opensora.models.mmdit.layers import timestep_embedding
from opensora.models.vae.autoencoder_2d import build_autoencoder_2d
from opensora.utils.weights_writing import save_safetensors

FOLDER = Path(__file__).with_name("frozen")
STORED, STRIDE = 2048, 17  # larger outputs are thinned out; 17 shares no factor with any height or width here


def draw(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the name and shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Give every weight a variance-preserving random value that depends on its name and shape alone."""
    for name, weight in model.named_parameters():
        noise = draw(name, *weight.shape)
        if weight.ndim > 1:
            weight.copy_(noise * weight[0].numel() ** -0.5)
        else:
            weight.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise)
    return model.eval()


def hunyuan_vae(**tiling) -> dict[str, Tensor]:
    sizes = dict(latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 16, 16, 32))
    model = randomize(build_hunyuan_vae(**sizes, sample_size=32, sample_tsize=8, tile_overlap_factor=0.5, **tiling))
    video, image = draw("video", 1, 3, 17, 40, 48), draw("image", 2, 3, 1, 16, 24)
    return {
        "moments": model.encode_moments(video),
        "kl": model.encode_posterior(video).kl(),
        "sampled": model.encode(video, generator=torch.Generator().manual_seed(3)),
        "decoded": model.decode(draw("latents", 1, 4, 5, 5, 6)),
        "image_latents": model.encode(image, sample_posterior=False),
        "image_decoded": model.decode(draw("image_latents", 2, 4, 1, 2, 3)),
    }


def dc_ae(**tiling) -> dict[str, Tensor]:
    layout = dict(width_list=[8, 8, 16, 32, 32, 32], depth_list=[1] * 6)
    tiles = dict(spatial_tile_size=64, temporal_tile_size=8, tile_overlap_factor=0.5)
    model = randomize(build_dc_ae(latent_channels=16, encoder=layout, decoder=layout, **tiles, **tiling))
    return {
        "latents": model.encode(draw("video", 1, 3, 12, 64, 96)),
        "decoded": model.decode(draw("latents", 1, 16, 3, 2, 3)),
        "image_latents": model.encode(draw("image", 2, 3, 1, 32, 64)),
        "image_decoded": model.decode(draw("image_latents", 2, 16, 1, 1, 2)),
    }


def autoencoder_2d() -> dict[str, Tensor]:
    model = randomize(build_autoencoder_2d(ch=32, ch_mult=[1, 2, 2, 2], num_res_blocks=1, z_channels=4))
    video = draw("video", 1, 3, 2, 24, 32)
    return {
        "latents": model.encode(video, sample_posterior=False),
        "sampled": model.encode(video, generator=torch.Generator().manual_seed(3)),
        "decoded": model.decode(draw("latents", 1, 4, 2, 3, 4)),
        "image_latents": model.encode(video[:, :, 0], sample_posterior=False),
        "image_decoded": model.decode(draw("image_latents", 2, 4, 2, 3)),
    }


def schedules() -> dict[str, Tensor]:
    t = torch.linspace(0, 1, 7)
    return {
        "video_256px": torch.tensor(flow.get_schedule(50, 252, 33)),
        "video_768px": torch.tensor(flow.get_schedule(50, 2304, 33)),
        "image": torch.tensor(flow.get_schedule(30, 2304, 1)),
        "given_shift": torch.tensor(flow.get_schedule(10, 1024, 17, flow_shift=3.0)),
        "unshifted": torch.tensor(flow.get_schedule(7, 100, 5, shift=False)),
        "training_times": flow.sample_timesteps(16, 252, 33, torch.Generator().manual_seed(0)),
        "time_embedding": timestep_embedding(t, 256),
        "sizes": torch.tensor([get_image_size(r, a) for r in ("256px", "768px") for a in ("16:9", "9:16", "1:1")]),
    }


def training() -> dict[str, Tensor]:
    data, noise = draw("data", 3, 10, 16), draw("noise", 3, 10, 16)
    masks = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 0, 0, 0]])
    keep = flow.unconditioned_tokens(masks, tokens_per_frame=2)
    return {
        "path": flow.interpolate(data, noise, torch.tensor([0.1, 0.5, 0.9])),
        "velocity": flow.velocity(data, noise),
        "kept": keep,
        "loss": flow.flow_matching_loss(data, noise),
        "masked_loss": flow.flow_matching_loss(data, noise, keep),
    }


def latents() -> dict[str, Tensor]:
    z = draw("z", 1, 4, 3, 4, 6)
    found = {"noise": get_noise([42, 7], 4, (3, 4, 6)), "unpacked": unpack(draw("tokens", 1, 18, 16), (3, 4, 6))}
    for patch_size in (1, 2):
        found[f"packed_{patch_size}"] = pack(z, patch_size)
        found[f"positions_{patch_size}"] = prepare_ids(1, (3, 4, 6), patch_size, txt_len=2)[0]
    refs = [[draw("head", 2, 20, 1, 2), draw("tail", 2, 20, 1, 2)]]
    for name in (name for name in CONDITIONS if name == "t2v" or get_spans(name)):
        for is_causal in (True, False):
            found[f"{name}_{is_causal}"] = build_condition(torch.zeros(1, 2, 20, 1, 2), name, refs, is_causal)
    return found


def guidance() -> dict[str, Tensor]:
    """Weights of the three branches at every one of 14 steps, by latent frame; a branch that is not run has zeros."""
    found = {}
    for name, scales in {
        "plain": Guidance(),
        "text_osci": Guidance(text_osci=True),
        "all_osci": Guidance(text_osci=True, image_osci=True, scale_temporal_osci=True),
        "off": Guidance(text=1.0, image=1.0),
    }.items():
        for has_image in (True, False):
            table = torch.zeros(14, len(Branch), 5)
            for step in range(14):
                for branch, weight in step_weights(scales, step, 14, 5, has_image):
                    table[step, list(Branch).index(branch)] = weight
            found[f"{name}_{has_image}"] = table
    return found


CASES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "hunyuan_vae": hunyuan_vae,
    "hunyuan_vae_spatial": lambda: hunyuan_vae(use_spatial_tiling=True),
    "hunyuan_vae_temporal": lambda: hunyuan_vae(use_temporal_tiling=True),
    "hunyuan_vae_both": lambda: hunyuan_vae(use_spatial_tiling=True, use_temporal_tiling=True, use_slicing=True),
    "dc_ae": dc_ae,
    "dc_ae_both": lambda: dc_ae(use_spatial_tiling=True, use_temporal_tiling=True, scaling_factor=0.5),
    "autoencoder_2d": autoencoder_2d,
    "schedules": schedules,
    "training": training,
    "latents": latents,
    "guidance": guidance,
}


@torch.no_grad()
def compute(name: str) -> dict[str, Tensor]:
    """Outputs of a case, as they are stored."""
    outputs = {key: value.float() for key, value in CASES[name]().items()}
    return {k: (v.flatten()[::STRIDE] if v.numel() > STORED else v).contiguous() for k, v in outputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_frozen_numbers(name):
    frozen, actual = load_file(FOLDER / f"{name}.safetensors"), compute(name)
    assert actual.keys() == frozen.keys()
    for key, expected in frozen.items():
        assert expected.isfinite().all()
        torch.testing.assert_close(
            actual[key], expected, atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_every_frozen_file_has_a_case_and_they_stay_small():
    files = list(FOLDER.glob("*.safetensors"))
    assert {file.stem for file in files} == set(CASES)
    assert sum(file.stat().st_size for file in files) < 300_000


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        save_safetensors(compute(case), FOLDER / f"{case}.safetensors")
