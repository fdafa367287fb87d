"""Fixtures that several files share: a few real clips, and tiny training configs for them."""

import copy
import pprint
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opensora.utils.video import save_video


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Six random clips of 9 frames, 32x32."""
    folder = tmp_path_factory.mktemp("train_clips")
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        path = save_video(rng.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), folder / f"{i}.mp4", fps=8)
        rows.append(dict(path=str(path), text=f"clip {i}", num_frames=9, height=32, width=32, fps=8.0))
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return str(folder / "clips.csv")


@pytest.fixture(scope="session")
def write_config():
    """Writer of a config file: ``write_config(path, content)`` returns the path as text."""

    def write(path: Path, content: dict[str, Any]) -> str:
        path.write_text("\n".join(f"{key} = {pprint.pformat(value)}" for key, value in content.items()))
        return str(path)

    return write


@pytest.fixture
def common(tmp_path, table):
    """What both trainings share."""
    return dict(
        device="cpu",
        dtype="fp32",
        seed=3,
        outputs=str(tmp_path / "outputs"),
        dataset=dict(type="video_text", data_path=table, fps_max=24),
        bucket_config={"32px_ar1:1": {9: (1.0, 2)}},
        num_workers=0,
        optim=dict(cls="HybridAdam", lr=1e-3),
        ema_decay=0.9,
        grad_clip=1.0,
        plugin="none",
        max_steps=5,
        ckpt_every=3,
    )


@pytest.fixture
def diffusion_content(common, tiny_config):
    """Content of a tiny diffusion training config; change it freely."""
    sections = {key: tiny_config[key] for key in ("model", "ae", "t5", "clip")}
    extra = dict(
        condition_config={"t2v": 1, "i2v_head": 1},
        dropout_ratio=dict(t5=0.3, clip=0.3),
        is_causal_vae=True,
        grad_checkpoint=False,
        warmup_steps=2,
        use_cosine_scheduler=True,
    )
    return copy.deepcopy({**common, **sections, **extra})


@pytest.fixture
def diffusion(tmp_path, diffusion_content, write_config):
    """The same as a config file."""
    return write_config(tmp_path / "train.py", diffusion_content)
