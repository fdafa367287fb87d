"""From a VAE trained on single frames to one for videos."""

import torch

from opensora.models.hunyuan_vae.autoencoder import AutoencoderKLCausal3D
from opensora.models.hunyuan_vae.blocks import CausalConv3d


@torch.no_grad()
def inflate_from_images(model: AutoencoderKLCausal3D) -> None:
    """Move each causal kernel's weight to its last (current-frame) tap, in place.

    On a single frame all taps see the same picture, so training there only shapes their sum: the sum goes to the tap
    of the current frame and the others start at zero. Every frame is then coded as the picture it was trained as, and
    training on videos begins from there ("centre inflation", as in I3D, arXiv:1705.07750, for causal kernels).
    """
    for module in model.modules():
        if isinstance(module, CausalConv3d) and module.kernel_size > 1:
            weight = module.conv.weight
            total = weight.sum(dim=2)
            weight.zero_()
            weight[:, :, -1] = total
