"""Command lines that would work, one per command."""

from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A script and the words of a run of it that would work."""

    script: str
    words: Sequence[str]


DIFFUSION, VAE = "scripts/diffusion", "scripts/vae"
INFERENCE = Command(f"{DIFFUSION}/inference.py", ("{good}/infer.py", "--prompt", "a", "--save-dir", "out"))
FROM_TABLE = Command(f"{DIFFUSION}/inference.py", ("{good}/infer.py", "--save-dir", "out"))
DECODE = Command(f"{DIFFUSION}/decode.py", ("{good}/infer.py", "{good}/sample.latents.safetensors"))
TRAIN = Command(f"{DIFFUSION}/train.py", ("{good}/train.py", "--outputs", "out"))
CACHE = Command(f"{DIFFUSION}/cache.py", ("{good}/train.py", "--cache-dir", "out"))
VAE_TRAIN = Command(f"{VAE}/train.py", ("{good}/vae_train.py", "--outputs", "out"))
VAE_INFERENCE = Command(f"{VAE}/inference.py", ("{good}/vae.py", "--save-dir", "out"))
VAE_STATS = Command(f"{VAE}/stats.py", ("{good}/vae.py",))
DATA = Command("tools/data/run.py", ("{good}/data.py", "--input", "{good}/footage", "--output", "out"))
META = Command("scripts/cnv/meta.py", ("--input", "{good}/clips.csv", "--output", "out.csv", "--num_workers", "0"))
