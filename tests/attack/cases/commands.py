"""Command lines that would work, one per command."""

from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A script and the words of a run of it that would work; ``after`` come behind a path without a flag."""

    script: str
    words: Sequence[str]
    after: Sequence[str] = ()

    def with_path(self, path: str, flag: str) -> tuple[str, ...]:
        """The command line with a path in the place of a flag's, or as a word of its own, instead of the config."""
        if flag:
            return (*self.words, f"{flag}={path}", *self.after)
        words = [word for word in self.words if not word.startswith("{good}/") or word.endswith(".csv")]
        config = [word for word in self.words if word.endswith(".py") and path.rpartition(".")[2] != "py"]
        return (*config, *(word for word in words if word not in config), path, *self.after)


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
