"""Measures by networks whose weights the user has: CLIP score, aesthetic head, Fréchet video distance, any TorchScript.

Nothing is downloaded. A network that scores clips (DOVER, FAST-VQA and the like) is given as a TorchScript file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from opensora.datasets.transforms import to_model_range
from opensora.utils.errors import UserError, first_line

Frames = NDArray[np.uint8]
FloatArray = NDArray[np.float64]

CLIP_FRAMES = 8  # of a clip, evenly spread
I3D_SIDE = 224  # px that the network of the Fréchet video distance was trained on
I3D_FRAMES = 10  # fewest that it takes
I3D_FLAGS = {"rescale": False, "resize": False, "return_features": True}  # of its usual export


class ClipScores:
    """How well a prompt matches a clip (100 x cosine of CLIP features), and how beautiful the clip is.

    Args:
        folder: of a CLIP model, as Hugging Face has it.
        device: where it works.
        head: weights of LAION's aesthetic head for it, None to leave that out.

    Raises:
        UserError: no such model or head, or the libraries of tools/data are missing.
    """

    def __init__(self, folder: Path, device: str, head: Path | None = None) -> None:
        try:
            from tools.data.stages.clip_scores import TEXT, VISION, check_clip, image_input, load_head
        except ImportError as error:
            raise UserError(f"--clip needs what tools/data does: pip install -e .[data] ({error})") from error
        from transformers import CLIPModel, CLIPTokenizer

        check_clip(str(folder), "clip", (*VISION, *TEXT))
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        self.model = model.to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.device, self.image_input = device, image_input
        self.head = load_head(head) if head is not None else None

    @torch.no_grad()
    def __call__(self, frames: Frames, prompt: str) -> dict[str, float]:
        """``clip_score`` and, with a head, ``aesthetic``."""
        chosen = np.linspace(0, len(frames) - 1, min(CLIP_FRAMES, len(frames))).round().astype(int)
        side = int(self.model.config.vision_config.image_size)
        pixels = torch.from_numpy(np.stack([self.image_input(frames[index], side) for index in chosen]))
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device))[1]
        image = F.normalize(self.model.visual_projection(pooled), dim=-1).double().cpu()
        tokens = self.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").to(self.device)
        text = F.normalize(self.model.text_projection(self.model.text_model(**tokens)[1]), dim=-1).double().cpu()
        found = {"clip_score": 100 * float((image @ text[0]).mean())}
        if self.head is not None:
            found["aesthetic"] = float(self.head(image.mean(0).numpy()))
        return found


def load_script(path: Path, device: str, flag: str) -> Any:
    """A TorchScript module.

    Raises:
        UserError: not there, or not one.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # of many kinds
        raise UserError(f"{flag} {path}: no TorchScript module ({first_line(error)})") from error


def script_score(module: Any, device: str) -> Callable[[Frames], float]:
    """Score of a clip by a module that takes ``[1, 3, T, H, W]`` in [-1, 1]; the mean of what it gives."""

    @torch.no_grad()
    def score(frames: Frames) -> float:
        return float(module(to_model_range(frames)[None].to(device)).double().mean())

    return score


class VideoFeatures:
    """Features of clips by the I3D network of the Fréchet video distance (Unterthiner et al. 2018).

    Args:
        path: TorchScript export, such as ``i3d_torchscript.pt`` of StyleGAN-V, or any that takes ``[1, 3, T, H, W]``
            in [-1, 1] and gives ``[1, D]``.
        device: where it works.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.module, self.device = load_script(path, device, "--fvd"), device
        known = str(getattr(self.module.forward, "schema", ""))
        self.flags = I3D_FLAGS if all(name in known for name in I3D_FLAGS) else {}

    @torch.no_grad()
    def __call__(self, frames: Frames) -> FloatArray:
        """``[D]`` of one clip; a short one is held at its last frame."""
        video = to_model_range(frames)
        if video.shape[1] < I3D_FRAMES:
            video = torch.cat([video, video[:, -1:].expand(-1, I3D_FRAMES - video.shape[1], -1, -1)], dim=1)
        size = (I3D_SIDE, I3D_SIDE)
        video = F.interpolate(video.transpose(0, 1), size, mode="bilinear", align_corners=False, antialias=True)
        features: Tensor = self.module(video.transpose(0, 1)[None].to(self.device), **self.flags)
        return features.double().cpu().numpy().reshape(-1)


def frechet_distance(first: Sequence[FloatArray], second: Sequence[FloatArray]) -> float:
    """Fréchet distance of Gaussians fitted to two sets of features, ``[N, D]`` and ``[M, D]``.

    Raises:
        UserError: fewer than two in either set.
    """
    if min(len(first), len(second)) < 2:
        raise UserError("a Fréchet distance needs at least two clips in each folder")
    a, b = (np.asarray(rows, np.float64) for rows in (first, second))
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))
