"""Scores from CLIP features: aesthetic, and how well a caption matches."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from PIL import Image

from opensora.config.options import Options, opt
from opensora.utils.errors import UserError, first_line, shorten
from opensora.utils.media.pictures import read_picture
from opensora.utils.paths import read_text
from tools.data.engine.stage import Row, Stage, Worker

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HELP = "hf download openai/clip-vit-large-patch14 --local-dir ckpts/clip-vit-large-patch14"
VISION, TEXT = ("vision_model", "visual_projection"), ("text_model", "text_projection")
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_HELP = f"download {HEAD} from github.com/christophschuhmann/improved-aesthetic-predictor"


def check_clip(path: str | None, key: str, parts: Sequence[str]) -> Path:
    """The folder of a CLIP model, looked into without loading it.

    Args:
        path: what the user gives.
        key: under which option.
        parts: modules of the model that are needed.

    Raises:
        UserError: none given, not there, another model, or one that lacks weights of a part; says how to get it.
    """
    if not path:
        raise UserError(f"no CLIP weights: {HELP}, then --{key} ckpts/clip-vit-large-patch14")
    folder = Path(path)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"--{key} {path}: no model there (config.json is missing); {HELP}")
    kind = _model_type(config)
    if kind != "clip":
        raise UserError(f"--{key} {path}: a model of type '{kind}', not CLIP (config.json: model_type); {HELP}")
    missing = sorted(_parameters(folder, parts) - _weight_names(folder, key))
    if missing:
        raise UserError(f"--{key} {path}: its weights lack {shorten(missing)}; {HELP}")
    return folder


def _parameters(folder: Path, parts: Sequence[str]) -> set[str]:
    """Names of the parameters that the parts of the model have, by its config."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    try:
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig.from_pretrained(folder))
    except Exception as error:  # of many kinds, by what the config says
        raise UserError(f"{folder / 'config.json'}: no CLIP can be made of it ({first_line(error)})") from error
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(parts))}


def _model_type(config: Path) -> str:
    try:
        content = json.loads(read_text(config))
        return str(content.get("model_type", "none"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} is damaged: {first_line(error)}") from error


def _weight_names(folder: Path, key: str) -> set[str]:
    """Names of the tensors in a folder's weight files."""
    import torch
    from safetensors import safe_open

    names: set[str] = set()
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"--{key} {folder}: no weights there (model.safetensors is missing); {HELP}")
    for file in files:
        try:
            if file.suffix == ".bin":
                names.update(torch.load(file, map_location="meta", weights_only=True))
                continue
            with safe_open(file, "numpy") as content:
                names.update(content.keys())
        except Exception as error:  # of many kinds, by what is wrong with the file
            raise UserError(f"--{key} {folder}: {file.name} is damaged: {first_line(error)}") from error
    return names


def _load(folder: Path, device: str) -> Any:
    from transformers import CLIPModel

    model: Any = CLIPModel.from_pretrained(folder)
    return model.to(device).eval()


def image_input(image: np.ndarray, side: int) -> np.ndarray:
    """What CLIP sees of a picture: uint8 [H, W, 3] to float32 [3, side, side], short side scaled, middle cut out."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    size = max(round(width * scale), side), max(round(height * scale), side)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((pixels - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)).transpose(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class ClipOptions(Options):
    """Features of the pictures, for aesthetic, match and duplicates."""

    path: str | None = opt(
        None, "folder of a CLIP model; the scores of others are of openai/clip-vit-large-patch14", neutral=True
    )
    device: str = opt("cpu", "cpu or cuda", neutral=True)


class ClipFeatures(Stage):
    """Mean over the sampled frames of their normalised CLIP features."""

    settings: ClipOptions

    name = "clip"
    reads = ("clip_id", "frame_paths")
    adds: ClassVar = {"clip_features": pl.List(pl.Float32)}

    def weights(self) -> Sequence[Path]:
        """The model's folder."""
        return [check_clip(self.settings.path, "clip.path", VISION)]

    def check(self) -> None:
        """The model is there."""
        self.weights()

    @property
    def device(self) -> str:
        """Where the model is."""
        return self.settings.device

    def worker(self) -> Worker:
        """Features of one clip."""
        import torch

        device = self.settings.device
        model = _load(self.weights()[0], device)
        side = int(model.config.vision_config.image_size)

        @torch.no_grad()
        def work(row: Row) -> list[Row]:
            images = [image_input(read_picture(self.root / path), side) for path in row["frame_paths"]]
            pooled = model.vision_model(pixel_values=torch.from_numpy(np.stack(images)).to(device))[1]
            features = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1).mean(0)
            return [{"clip_features": features.cpu().tolist()}]

        return work


@dataclass(frozen=True, kw_only=True)
class AestheticOptions(Options):
    """Aesthetic score: CLIP features through a small head."""

    head: str | None = opt(None, "weights of the head (sac+logos+ava1-l14-linearMSE.pth)", neutral=True)


class Aesthetic(Stage):
    """LAION's aesthetic score, about 1 to 10; 5.5 is fair, 6.5 high. The head is linear, so the mean may come first."""

    settings: AestheticOptions

    name = "aesthetic"
    reads = ("clip_features",)
    adds: ClassVar = {"aesthetic": pl.Float64}

    def weights(self) -> Sequence[Path]:
        """The head's file."""
        head = self.settings.head
        if not head:
            raise UserError(f"stage 'aesthetic' has no weights: {HEAD_HELP}, then --aesthetic.head {HEAD}")
        if not Path(head).is_file():
            raise UserError(f"--aesthetic.head {head}: no such file; {HEAD_HELP}")
        return [Path(head)]

    def check(self) -> None:
        """The head is there."""
        self.weights()

    def worker(self) -> Worker:
        """Score one clip."""
        head = load_head(self.weights()[0])
        return lambda row: [{"aesthetic": head(np.asarray(row["clip_features"], np.float64))}]


def load_head(path: Path) -> Callable[[np.ndarray], float]:
    """A chain of linear layers (``layers.N.weight``, ``layers.N.bias``), no activations between.

    Raises:
        UserError: a file of another kind, or features of another width (at the first call).
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        numbers = sorted({int(name.split(".")[1]) for name in state})
        layers = [
            (state[f"layers.{n}.weight"].double().numpy(), state[f"layers.{n}.bias"].double().numpy()) for n in numbers
        ]
    except Exception as error:  # pickles fail in any way
        raise UserError(f"{path} is not an aesthetic head (layers.N.weight, layers.N.bias): {error}") from error

    def score(features: np.ndarray) -> float:
        if features.shape[-1] != layers[0][0].shape[1]:
            raise UserError(
                f"{path.name} takes {layers[0][0].shape[1]} features, the CLIP model of clip.path gives "
                f"{features.shape[-1]}; it belongs to openai/clip-vit-large-patch14"
            )
        for weight, bias in layers:
            features = weight @ features + bias
        return float(features[0])

    return score


@dataclass(frozen=True, kw_only=True)
class MatchOptions(Options):
    """How well caption and picture match: 100 x cosine of CLIP features."""

    path: str | None = opt(None, "folder of the CLIP model that clip.path names", neutral=True)
    device: str = opt("cpu", "cpu or cuda", neutral=True)


class Match(Stage):
    """100 x cosine between the features of the caption and of the pictures; about 20 to 35 where they match."""

    settings: MatchOptions

    name = "match"
    reads = ("clip_features", "text")
    adds: ClassVar = {"match": pl.Float64}

    def weights(self) -> Sequence[Path]:
        """The model's folder."""
        folder = check_clip(self.settings.path, "match.path", TEXT)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"--match.path {folder}: no tokenizer there (tokenizer.json is missing); {HELP}")
        return [folder]

    def check(self) -> None:
        """The model is there."""
        self.weights()

    @property
    def device(self) -> str:
        """Where the model is."""
        return self.settings.device

    def worker(self) -> Worker:
        """Match one clip."""
        import ftfy
        import torch
        from transformers import CLIPTokenizer

        folder, device = self.weights()[0], self.settings.device
        model, tokenizer = _load(folder, device), CLIPTokenizer.from_pretrained(folder)

        @torch.no_grad()
        def work(row: Row) -> list[Row]:
            if not row["text"]:
                raise UserError("no caption to match")
            tokens = tokenizer(ftfy.fix_text(row["text"]), truncation=True, max_length=77, return_tensors="pt")
            text = model.text_projection(model.text_model(**tokens.to(device))[1])[0].double().cpu()
            image = torch.tensor(row["clip_features"], dtype=torch.float64)
            if image.shape != text.shape:
                raise UserError(f"clip.path gives {len(image)} features, match.path {len(text)}: use one model")
            return [{"match": 100 * float(torch.nn.functional.cosine_similarity(text, image, dim=0))}]

        return work
