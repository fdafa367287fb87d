"""Latent statistics per channel, to paste into a config: ``python scripts/vae/stats.py CONFIG [--key value ...]``."""

from itertools import islice

import torch
from tqdm import tqdm

from opensora.config import parse_config, run_main
from opensora.datasets.dataloader import build_train_loader
from opensora.diffusion.building import pick_device, torch_dtype
from opensora.registry import DATASETS, MODELS, build_module
from opensora.schema import VaeStatsOptions


class RunningMoments:
    """Mean and variance per channel, combined batch by batch in float64 (Chan et al. 1983), so nothing cancels."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, z: torch.Tensor) -> None:
        """Take in ``z [B, C, t, h, w]``."""
        values = z.double().transpose(0, 1).flatten(1)
        count, mean = values.shape[1], values.mean(dim=1)
        squares = (values - mean[:, None]).square().sum(dim=1)
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * count / total
        self.squares = self.squares + squares + delta.square() * self.count * count / total
        self.count = total

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation per channel."""
        return (self.squares / self.count).sqrt()


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Encode the dataset and print scale and shift that give every latent channel mean 0 and variance 1."""
    cfg = parse_config(argv, VaeStatsOptions)
    device, dtype = pick_device(cfg.device), torch_dtype(cfg.dtype)
    dataset = build_module(dict(cfg.dataset), DATASETS, require_text=False)
    loader, _ = build_train_loader(dataset, cfg.bucket_config, seed=cfg.seed, num_workers=cfg.num_workers)
    model = build_module(dict(cfg.model), MODELS, device_map=str(device), torch_dtype=dtype).eval()
    moments = RunningMoments()
    batches = min(len(loader), cfg.max_batches or len(loader))
    for batch in tqdm(islice(loader, batches), total=batches, unit="batch"):
        z = model.encode(batch["video"].to(device, dtype))
        moments.add(model.denormalize(z) if hasattr(model, "denormalize") else z)

    def listed(values: torch.Tensor) -> str:
        return "[" + ", ".join(f"{value:.4f}" for value in values.tolist()) + "]"

    print(f"mean = {listed(moments.mean)}\nstd = {listed(moments.std)}")
    print(f"scale_factor={listed(1 / moments.std)},\nshift_factor={listed(moments.mean)},")


if __name__ == "__main__":
    run_main(main)
