"""LPIPS, the learned perceptual distance of images (Zhang et al. 2018, arXiv:1801.03924), on VGG16 features."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.config.options import LpipsOptions
from opensora.utils.errors import UserError
from opensora.utils.weights import WeightFiles, open_weights
from opensora.utils.weights_loading import check_match

CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each VGG16 stage; a stage ends after its last ReLU, the next begins with a pooling
WIDTHS = (64, 128, 256, 512, 512)
MIN_SIDE = 16  # four poolings halve a frame to one pixel
# Mean and standard deviation of the classifier's training images, for pixels in [-1, 1] instead of [0, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
CLASSIFIER = ("classifier.", "pre_logits.", "head.")  # what files of the whole VGG16 hold beyond its features
DOWNLOADS = """
  mkdir -p ckpts/lpips
  curl -L -o ckpts/lpips/vgg.pth \
https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth
  curl -L -o ckpts/lpips/vgg16.pth https://download.pytorch.org/models/vgg16-397923af.pth"""


class LPIPS(nn.Module):
    """Distance of images: squared differences of unit-length VGG16 features, weighted per channel, averaged per image.

    Always frozen and in eval mode. State-dict keys are those of the released files together: ``features.N.*``
    (torchvision's VGG16) and ``linK.model.1.weight`` (the heads).

    Args:
        widths: channels of the five stages; others than the released ones are for tests.
        grad_checkpoint: recompute each stage's activations in the backward pass.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.grad_checkpoint = grad_checkpoint
        layers: list[nn.Module] = []
        self._ends: list[int] = []  # where each stage ends in `features`
        channels = 3
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS, widths, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self._ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        for k, width in enumerate(widths):
            head = nn.Module()
            head.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))  # released: after a dropout
            self.add_module(f"lin{k}", head)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode whatever it is part of."""
        del mode
        return super().train(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Features after each of the five stages.

        Args:
            images: ``[N, 3, H, W]`` in [-1, 1].

        Returns:
            ``[N, width, H / 2^k, W / 2^k]`` each.
        """
        shift, scale = (images.new_tensor(values).reshape(3, 1, 1) for values in (SHIFT, SCALE))
        x = (images - shift) / scale
        found = []
        for start, end in zip([0, *self._ends], self._ends):
            stage = self.features[start:end]
            again = self.grad_checkpoint and x.requires_grad
            x = checkpoint(stage, x, use_reentrant=False) if again else stage(x)
            found.append(x)
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of each pair of images, ``[N]``; 0 for equal ones.

        Args:
            first, second: ``[N, 3, H, W]`` in [-1, 1].

        Raises:
            UserError: images smaller than 16 x 16.
        """
        if min(first.shape[-2:]) < MIN_SIDE:
            raise UserError(
                f"LPIPS needs frames of at least {MIN_SIDE}x{MIN_SIDE} px, not {first.shape[-2]}x{first.shape[-1]}"
            )
        total = first.new_zeros(first.shape[0])
        for k, (a, b) in enumerate(zip(self.stages(first), self.stages(second))):
            weight = self.get_submodule(f"lin{k}.model.1").weight  # type: ignore[union-attr]
            difference = (unit_length(a) - unit_length(b)).square()
            total = total + F.conv2d(difference, weight).mean(dim=(1, 2, 3))  # type: ignore[arg-type]
        return total


def unit_length(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features ``[N, C, H, W]`` divided by their length over the channels; where all are zero, so is the gradient."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + eps)


def lpips_files(source: LpipsOptions) -> WeightFiles | None:
    """Both files of LPIPS as one state dict, None for random weights.

    Raises:
        UserError: neither both files nor ``random``, both at once, or files that are missing or unreadable.
    """
    if source.random:
        if source.heads or source.backbone:
            raise UserError("lpips.random=True and files of weights exclude each other: set random=False, or no files")
        return None
    missing = [name for name in ("heads", "backbone") if not getattr(source, name)]
    if missing:
        raise UserError(
            f"the perceptual loss and LPIPS need weights, and lpips.{missing[0]} is not set. Give the files of the "
            f"linear heads and of VGG16, lpips=dict(heads='./ckpts/lpips/vgg.pth', "
            f"backbone='./ckpts/lpips/vgg16.pth'), downloaded with:{DOWNLOADS}\n"
            "or ask for random weights with lpips=dict(random=True), or set perceptual_loss_weight=0"
        )
    opened = []
    for name in ("backbone", "heads"):
        try:
            opened.append(open_weights(getattr(source, name), source.cache_dir))
        except UserError as error:
            raise UserError(f"lpips.{name}: {error}\nReleased weights are downloaded with:{DOWNLOADS}") from error
    return WeightFiles(opened[1].path, [file for weights in opened for file in weights.files])


def check_lpips(source: LpipsOptions | None) -> None:
    """See that the weights are there and fit, before anything else is built.

    Raises:
        UserError: they are not, or do not.
    """
    weights = lpips_files(source or LpipsOptions())
    if weights is not None:
        with torch.device("meta"):
            check_match(LPIPS(), weights, allow_unexpected=CLASSIFIER)


def build_lpips(
    source: LpipsOptions | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    grad_checkpoint: bool = False,
) -> LPIPS:
    """LPIPS with released weights, or with random ones where the source asks for them.

    Args:
        source: where the weights come from; None says nothing of it.
        device, dtype: of the weights.
        grad_checkpoint: see `LPIPS`.

    Raises:
        UserError: weights that are not given, not there, or of another model.
    """
    weights = lpips_files(source or LpipsOptions())
    if weights is None:
        with torch.random.fork_rng(devices=[]):  # the same weights in every run, and nobody else's draws change
            torch.manual_seed(0)
            model = LPIPS(grad_checkpoint=grad_checkpoint)
            _randomize(model.parameters())
        return model.to(device, dtype)
    model = LPIPS(grad_checkpoint=grad_checkpoint)
    _, unexpected = check_match(model, weights, allow_unexpected=CLASSIFIER)
    own = model.state_dict()
    for key, tensor in weights.tensors(skip=unexpected):
        own[key].copy_(tensor)
    return model.to(device, dtype)


def _randomize(parameters: Iterable[nn.Parameter]) -> None:
    """He initialisation, which keeps the scale of features through ReLUs; heads, to be positive, uniform."""
    for parameter in parameters:
        if parameter.ndim == 1:
            nn.init.zeros_(parameter)
        elif parameter.shape[0] == 1:
            nn.init.uniform_(parameter, 0.0, 2.0)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
