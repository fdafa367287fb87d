"""Statistics of latents, gathered clip by clip."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.config.commands import VaeStatsOptions
from opensora.datasets.dataloader import build_train_loader
from opensora.datasets.source import build_source
from opensora.evaluation.clips import SIZE_MULTIPLE, bucket_of
from opensora.models.autoencoder import as_autoencoder, check_buckets, listed
from opensora.models.build import build_on_meta, build_ready, check_weights
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.progress import Bar

logger = get_logger(__name__)


class RunningMoments:
    """Mean and variance per channel, combined batch by batch in float64 (Chan et al. 1983), so nothing cancels."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        """Take in latents ``[B, C, t, h, w]``."""
        values = z.detach().double().cpu().transpose(0, 1).flatten(1)
        mean = values.mean(dim=1)
        self._combine(values.shape[1], mean, (values - mean[:, None]).square().sum(dim=1))

    def merge(self, state: dict[str, Any]) -> None:
        """Take in what another one's `state` says."""
        mean, squares = (torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "squares"))
        self._combine(int(state["count"]), mean, squares)

    def _combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * count / total
        self.squares = self.squares + squares + delta.square() * self.count * count / total
        self.count = total

    def state(self) -> dict[str, Any]:
        """Count, means and sums of squared deviations, as plain numbers."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel."""
        return (self.squares / self.count).sqrt()

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation over all channels together."""
        mean = self.mean.mean()
        variance = (self.squares / self.count).mean() + (self.mean - mean).square().mean()
        return float(mean), float(variance.sqrt())


@torch.no_grad()
def latent_statistics(cfg: VaeStatsOptions) -> str:
    """Encode a dataset, and say what its raw latents are like and which config keys scale them to unit variance.

    Args:
        cfg: resolved config (``VaeStatsOptions``).

    Returns:
        Lines with the mean and standard deviation per channel, that of the posterior's noise if there is one, and the
        config keys of the autoencoder.

    Raises:
        UserError: anything wrong with config, table or weights.
    """
    if cfg.model is None or cfg.dataset is None:
        raise UserError(f"{cfg.config_path}: '{'model' if cfg.model is None else 'dataset'}' is missing")
    device, dtype = pick_device(cfg.device), torch_dtype(cfg.dtype)
    check_weights("model", cfg.model)
    buckets = (bucket_of(cfg.eval_setting) if cfg.eval_setting else cfg.bucket_config) or {}
    spec = as_autoencoder(build_on_meta(cfg.model))
    check_buckets(buckets, spec)
    dataset = build_source(cfg.dataset, require_text=False)
    loader, sampler = build_train_loader(
        dataset,
        buckets,
        multiple=max(SIZE_MULTIPLE, *spec.compression[1:]),
        seed=cfg.seed,
        num_workers=cfg.num_workers,
        prefetch_factor=cfg.prefetch_factor,
    )
    if sampler.notice:
        logger.warning("%s", sampler.notice)
    model = as_autoencoder(build_ready(cfg.model, device, dtype))
    torch.manual_seed(cfg.seed)  # of the posterior's noise, which a diffusion model is trained with as well
    moments, noise = RunningMoments(), RunningMoments()
    batches = min(len(loader), cfg.max_batches or len(loader))
    for batch in Bar(islice(loader, batches), total=batches, unit="batch", disable=cfg.verbose == 0):
        stored = model.encode_stored(batch["video"].to(device, dtype))
        drawn, mean = (model.denormalize(model.from_stored(stored, None, sample)) for sample in (True, False))
        moments.add(drawn)
        noise.add(drawn - mean)
    lines = [f"mean = {listed(moments.mean)}", f"std = {listed(moments.std)}"]
    if bool((noise.std > 0).all()):
        lines.append(f"noise = {listed(noise.std)}")
    return "\n".join([*lines, model.scale_text(moments)])
