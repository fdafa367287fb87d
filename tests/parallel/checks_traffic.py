"""What parallelism sends, as the operating system counts it, beside the formulas."""

from pathlib import Path

import torch
import torch.distributed as dist

from tools.benchmark.parallel import WAYS, bytes_per_forward, sent_per_forward, small_config


def formulas(folder: Path) -> None:
    for way in WAYS:
        sent = torch.tensor([float(sent_per_forward(way, image=301, text=33))])
        dist.all_reduce(sent)
        expected = bytes_per_forward(small_config(), way, 2, 301, 33, width=4)
        found = sent.item() / dist.get_world_size()
        assert abs(found / expected - 1) < 0.02, (way, found, expected)


CHECKS = [formulas]
