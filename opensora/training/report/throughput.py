"""How much arithmetic a training step is, and how much a device could do."""

import torch

from opensora.models.diffusion import DiffusionModel
from opensora.models.quantization.linear import parameter_sizes

# Peak of dense bf16 / fp16 matrix products in TFLOP/s, without sparsity, from the makers' data sheets. The first name
# that the device's name contains counts.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)
TERA = 1e12


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of a device in operations per second; None where the table does not say (CPUs, other GPUs, fp32)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * TERA for key, peak in PEAK_TFLOPS if key in name), None)


class TrainingFlops:
    """Operations of one training sample (forward and backward) of a diffusion model, by its size.

    The backward pass costs one forward for the gradients of the activations, and one more for those of the weights,
    in the share of them that is trained. Blocks that are computed again do not count: this is the work of the model,
    not of the method (the usual definition of MFU).

    Args:
        model: adapters included.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        sizes = [*parameter_sizes(model)]
        self.trained_share = sum(p.numel for p in sizes if p.trains) / max(sum(p.numel for p in sizes), 1)
        self._known: dict[tuple[int, int], float] = {}

    def per_sample(self, image_tokens: int, text_tokens: int) -> float:
        """Floating-point operations, 2 per multiply-add."""
        key = (image_tokens, text_tokens)
        if key not in self._known:
            self._known[key] = self._model.forward_flops(*key) * (2 + self.trained_share)
        return self._known[key]
