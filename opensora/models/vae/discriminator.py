"""Discriminator of clips that judges overlapping patches (PatchGAN, arXiv:1611.07004, with a time axis)."""

import torch
from torch import Tensor, nn

from opensora.models.vae.config import DiscriminatorConfig
from opensora.models.vae.convolution import Conv3d
from opensora.registry import MODELS
from opensora.utils.weights_loading import load_model

MAX_FACTOR = 8  # widths grow to this many times the first one


class NLayerDiscriminator3D(nn.Module):
    """One score per patch of a clip: high for real ones, low for reconstructions.

    The first two convolutions halve frames and picture, the next ``n_layers - 2`` halve the picture only, two more keep
    both. All but the first and the last are followed by batch normalisation and dropout.

    Args:
        config: channels, layers (those that halve the picture) and dropout (after every normalised layer).
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        ndf, n_layers = config.ndf, config.n_layers
        self.n_layers = n_layers
        layers: list[nn.Module] = [Conv3d(config.input_nc, ndf, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            stride = (1, 1, 1) if n == n_layers else (2, 2, 2) if n == 1 else (1, 2, 2)
            previous, width = width, ndf * min(2**n, MAX_FACTOR)
            layers += [
                Conv3d(previous, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.LeakyReLU(0.2),
                nn.Dropout(config.dropout),
            ]
        layers.append(Conv3d(width, 1, 3, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def patches(self, frames: int, height: int, width: int) -> int:
        """Number of scores of one clip; 0 where the picture is smaller than the patches are apart."""
        time = -(-frames // 2)
        time = -(-time // 2) if self.n_layers > 1 else time
        return time * (height >> self.n_layers) * (width >> self.n_layers)

    def forward(self, clip: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` in [-1, 1] to scores ``[B, 1, T / 4, H / 2^n_layers, W / 2^n_layers]``, rounded up."""
        return self.main(clip)


@MODELS.register_module("N_Layer_discriminator_3D")
def build_discriminator(
    config: DiscriminatorConfig,
    device_map: str | torch.device = "cpu",
    torch_dtype: torch.dtype = torch.float32,
) -> NLayerDiscriminator3D:
    """Build a patch discriminator, with weights from a file or freshly initialised.

    Args:
        config: layout, and the file of the weights (see `opensora.utils.weights.resolve_path`).
        device_map: device of the model; "meta" builds it without memory.
        torch_dtype: dtype of the weights.

    Raises:
        UserError: config or weights that do not fit.
    """
    source = None if torch.device(device_map).type == "meta" else config.from_pretrained
    return load_model(
        lambda: NLayerDiscriminator3D(config), source, device_map, torch_dtype, cache_dir=config.cache_dir
    )
