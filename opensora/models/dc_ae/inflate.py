"""From a video DC-AE trained on single frames to one for videos."""

import torch
from torch import nn

from opensora.models.dc_ae.autoencoder import DCAE


@torch.no_grad()
def inflate_from_images(model: DCAE) -> None:
    """Set all taps of the kernels but the middle one in time to zero, in place.

    On a single frame only the middle tap sees anything, so training there leaves the others as they were drawn. With
    them at zero, convolutions treat every frame as the picture they were trained on, and training on videos begins
    from there ("centre inflation", as in I3D, arXiv:1705.07750). Attention and the shortcuts between stages work
    across frames from the first step, so that clips are only coded about as well as pictures.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            middle = module.kernel_size[0] // 2
            module.weight[:, :, :middle] = 0
            module.weight[:, :, middle + 1 :] = 0
