"""The files that VBench's scorers load, one by one: where they belong in its cache, and where they come from.

The scorers would download them on their own, each from another host; with all of them in place they need no network.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opensora.utils.errors import UserError

HUB = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
CLIP = "https://openaipublic.azureedge.net/clip/models"
DETECTED = ("object_class", "multiple_objects", "color", "spatial_relationship")
WORDED = ("temporal_style", "overall_consistency")


@dataclass(frozen=True)
class ModelFile:
    """A file (or folder) of the cache.

    Attributes:
        path: below the cache.
        get: shell command that gets it; ``{cache}`` stands for the cache.
        dimensions: that need it, in either suite.
    """

    path: str
    get: str
    dimensions: tuple[str, ...]

    def command(self, cache: Path) -> str:
        """How to get the file."""
        return self.get.format(cache=cache, folder=(cache / self.path).parent, path=cache / self.path)


def _file(path: str, url: str, *dimensions: str) -> ModelFile:
    return ModelFile(path, "mkdir -p {folder} && curl -L -o {path} " + url, dimensions)


def _repository(path: str, name: str, *dimensions: str) -> ModelFile:
    return ModelFile(path, f"git clone https://github.com/{name} {{path}}", dimensions)


DREAMSIM = "https://github.com/ssundaram21/dreamsim/releases/download/v0.1.0/dreamsim_checkpoint.zip"
RAFT = "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"
FILES = (
    _repository("dino_model/facebookresearch_dino_main", "facebookresearch/dino", "subject_consistency", "i2v_subject"),
    _file(
        "dino_model/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        *("subject_consistency", "i2v_subject"),
    ),
    _file(
        "clip_model/ViT-B-32.pt",
        f"{CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        *("background_consistency", "appearance_style"),
    ),
    _file(
        "clip_model/ViT-L-14.pt",
        f"{CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "aesthetic_quality",
    ),
    _file(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
        "aesthetic_quality",
    ),
    _file(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        "imaging_quality",
    ),
    _file("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", "motion_smoothness"),
    ModelFile(
        "raft_model/models/raft-things.pth",
        "mkdir -p {cache}/raft_model && curl -L -o {cache}/raft_model/models.zip "
        + RAFT
        + " && unzip -d {cache}/raft_model {cache}/raft_model/models.zip",
        ("dynamic_degree",),
    ),
    _file(
        "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        f"{HUB}/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        "human_action",
    ),
    _file("grit_model/grit_b_densecap_objectdet.pth", f"{HUB}/grit_b_densecap_objectdet.pth", *DETECTED),
    _file(
        "caption_model/tag2text_swin_14m.pth",
        "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
        "scene",
    ),
    _file("ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{HUB}/ViClip-InternVid-10M-FLT.pth", *WORDED),
    _file(
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
        *WORDED,
    ),
    ModelFile(
        "huggingface/hub/models--bert-base-uncased",
        "HF_HOME={cache}/huggingface hf download bert-base-uncased config.json vocab.txt tokenizer.json "
        "tokenizer_config.json model.safetensors",
        (*DETECTED, "scene"),
    ),
    ModelFile(
        "dreamsim/dino_vitb16_lora",
        "mkdir -p {cache}/dreamsim && curl -L -o {cache}/dreamsim/pretrained.zip "
        + DREAMSIM
        + " && unzip -d {cache}/dreamsim {cache}/dreamsim/pretrained.zip",
        ("i2v_background",),
    ),
    _repository("torch/hub/facebookresearch_co-tracker_main", "facebookresearch/co-tracker", "camera_motion"),
    _file(
        "torch/hub/checkpoints/cotracker2.pth",
        "https://huggingface.co/facebook/cotracker/resolve/main/cotracker2.pth",
        "camera_motion",
    ),
)


def needed(dimensions: Iterable[str]) -> list[ModelFile]:
    """What some dimensions need."""
    wanted = set(dimensions)
    return [file for file in FILES if wanted & set(file.dimensions)]


def missing(cache: Path, dimensions: Iterable[str]) -> list[ModelFile]:
    """What of it is not there."""
    return [file for file in needed(dimensions) if not (cache / file.path).exists()]


def check_models(cache: Path, dimensions: Iterable[str]) -> None:
    """Raise a UserError that has the commands which get the files that are not there."""
    if files := missing(cache, dimensions):
        commands = "\n".join(f"  {file.command(cache)}" for file in files)
        raise UserError(f"--cache {cache} lacks {len(files)} of the files that these dimensions need:\n{commands}")
