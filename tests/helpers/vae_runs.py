"""Tiny training runs of autoencoders, for tests of one and of several processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from opensora.config import load_config
from opensora.config.commands import VaeTrainOptions
from opensora.utils.video import save_video

CODER = dict(width_list=[4, 8, 8], depth_list=[1, 1, 1], block_type="ResBlock")
TIME = [True, True, False]
MODELS = {
    "dc_ae": dict(
        type="dc_ae",
        from_scratch=True,
        is_training=True,
        latent_channels=4,
        encoder={**CODER, "temporal_downsample": TIME},
        decoder={**CODER, "temporal_upsample": TIME},
    ),
    "hunyuan_vae": dict(
        type="hunyuan_vae",
        latent_channels=4,
        block_out_channels=[4, 4, 8, 8],
        layers_per_block=1,
        norm_num_groups=2,
        dropout=0.1,
    ),
}
FRAMES = {"dc_ae": 8, "hunyuan_vae": 9}
DISCRIMINATOR = dict(type="N_Layer_discriminator_3D", input_nc=3, ndf=2, n_layers=2, conv_cls="conv3d")
OPTIMIZER = dict(cls="HybridAdam", lr=1e-3, betas=(0.9, 0.98))
AUTOENCODER, AVERAGE, JUDGE = "model/model.safetensors", "ema.safetensors", "discriminator/model.safetensors"


def write_clips(folder: Path, count: int = 4) -> str:
    """Table of random clips of 9 frames, 32x32."""
    rng, rows = np.random.default_rng(1), []
    for i in range(count):
        path = save_video(rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", fps=8)
        rows.append(dict(path=str(path), num_frames=9, height=32, width=32, fps=8.0))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return str(folder / "clips.csv")


def tiny_run(kind: str, table: str, outputs: Path, /, **changes: Any) -> Any:
    """Config of two steps with a discriminator."""
    content = dict(
        model=MODELS[kind],
        dataset=dict(type="video_text", data_path=table, fps_max=24, keep_in_memory=True),
        bucket_config={"32px_ar1:1": {FRAMES[kind]: (1.0, 2)}},
        device="cpu",
        dtype="fp32",
        num_workers=0,
        outputs=str(outputs),
        plugin="none",
        max_steps=2,
        grad_clip=1.0,
        optim=OPTIMIZER,
        ema_decay=0.9,
        discriminator=DISCRIMINATOR,
        optim_discriminator=OPTIMIZER,
        gen_loss_config=dict(gen_start=1, disc_weight=0.05),
        disc_loss_config=dict(disc_start=0, disc_loss_type="hinge"),
    )
    return load_config({**content, **changes}, VaeTrainOptions)


def newest(folder: Path) -> Path:
    """The checkpoint of a run that was written last."""
    return max(folder.glob("epoch*"), key=lambda path: path.stat().st_mtime_ns)


def weights(checkpoint: Path, *names: str) -> dict[str, Tensor]:
    """Tensors of weight files of a checkpoint."""
    return {f"{name}:{key}": value for name in names for key, value in load_file(checkpoint / name).items()}
