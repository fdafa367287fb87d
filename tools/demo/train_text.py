"""Build the demo's tiny T5 and CLIP text encoders: tokenizers, then weights that know what a caption says.

Each encoder is trained, together with linear heads that are thrown away, to tell colour, shape, motion and background
(or that a text leaves them out) from captions. Only combinations that the training clips show are used; wordings and
combinations that were not trained on are measured at the end. The folders are in Hugging Face format.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opensora.config import run_main
from opensora.models.text.embedder import HFEmbedder
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import discard_folder, naming, put_in_place, remove_unfinished_folders, temporary_path
from opensora.utils.progress import Bar
from tools.arguments import Bounded
from tools.demo.captions import caption_and_background
from tools.demo.text_tokenizers import train_clip_tokenizer, train_t5_tokenizer
from tools.demo.wordings import VALUES, WORDS, Attributes, roughen, sample_attributes, unseen_caption, wide_caption
from tools.demo.world import FPS, Combination, combinations, sample_scene

SCRATCH = "text"  # of the folder that is being written
T5_FOLDER, CLIP_FOLDER = "google/t5-demo", "openai/clip-demo"  # HFEmbedder tells CLIP by "openai" in the path
T5_LENGTH, CLIP_LENGTH = 24, 77
WIDTH = 64  # of both encoders' outputs
PEAK_LR = 2e-3
TOKEN_WEIGHT = 0.5  # of the loss on single tokens beside that on their mean


class Example(NamedTuple):
    """A text and what it says."""

    text: str
    attributes: Attributes


def described(split: str) -> list[Combination]:
    """What the texts of a split are about; all but those of held-out combinations are also about motions that go on."""
    return combinations(split) if split == "held_out" else [*combinations(split), *combinations("long")]


def clip_caption(rng: np.random.Generator, split: str) -> Example:
    """A caption as the clips have it, with the suffix that training adds."""
    choices = described(split)
    scene = sample_scene(rng, choices[int(rng.integers(len(choices)))])
    text, named = caption_and_background(scene, rng)
    return Example(f"{text} {FPS} FPS.", Attributes(scene.color, scene.shape, scene.motion, named))


def training_example(rng: np.random.Generator) -> Example:
    """A caption of a training clip, or as often a text in another wording that may leave things out."""
    if rng.random() < 0.5:
        return clip_caption(rng, "train")
    attributes = sample_attributes(rng, described("train"))
    return Example(roughen(wide_caption(attributes, rng), rng), attributes)


def unseen_example(rng: np.random.Generator) -> Example:
    """A text in a wording that training does not use, of any combination."""
    attributes = sample_attributes(rng, described("all"), missing=0.0, no_background=0.0)
    return Example(f"{unseen_caption(attributes, rng)} {FPS} FPS.", attributes)


def targets(examples: list[Example]) -> Tensor:
    """Class indices [B, 4] of colour, shape, motion and background; the last class of each is "not named"."""
    rows = [[VALUES[name].index(value) for name, value in e.attributes._asdict().items()] for e in examples]
    return torch.tensor(rows)


class Heads(nn.Module):
    """One linear classifier per attribute on features [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in VALUES.values())

    def forward(self, features: Tensor) -> list[Tensor]:
        """Logits [..., classes] of each attribute."""
        return [head(features) for head in self.heads]

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of features [B, ..., width] with labels [B, 4]."""
        total = features.new_zeros(())
        for logits, label in zip(self(features), labels.unbind(1), strict=True):
            label = label.view(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:-1])
            total = total + F.cross_entropy(logits.flatten(0, -2), label.flatten())
        return total


def build_t5(vocabulary: int) -> T5EncoderModel:
    """A fresh T5 encoder of the v1.1 kind for a vocabulary of so many tokens."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def build_clip(vocabulary: int) -> CLIPTextModel:
    """A fresh CLIP text encoder for a vocabulary of so many tokens, start and end being the last two."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def fit(
    name: str,
    model: nn.Module,
    features: Callable[[list[str]], tuple[Tensor, Tensor | None]],
    rng: np.random.Generator,
    steps: int,
    batch_size: int,
) -> Heads:
    """Train ``model`` and heads on what ``features(texts)`` gives: [B, D] and, if wanted too, tokens [B, L, D]."""
    heads = Heads(WIDTH)
    model.train()
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.1)
    progress = Bar(range(steps), desc=name, unit="step")
    for step in progress:
        examples = [training_example(rng) for _ in range(batch_size)]
        pooled, tokens = features([e.text for e in examples])
        labels = targets(examples)
        loss = heads.loss(pooled, labels)
        if tokens is not None:
            loss = loss + TOKEN_WEIGHT * heads.loss(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return heads


def train_t5(folder: Path, texts: list[str], rng: np.random.Generator, steps: int, batch_size: int) -> Heads:
    """Tokenizer and weights of the T5 encoder into ``folder``; returns the heads for measuring."""
    folder.mkdir(parents=True)
    model = build_t5(train_t5_tokenizer(texts, folder))
    tokenizer = T5Tokenizer.from_pretrained(str(folder), legacy=True)

    def features(batch: list[str]) -> tuple[Tensor, Tensor]:
        # No attention mask: the video model reads the padding too, so it takes part here.
        ids = tokenizer(batch, truncation=True, max_length=T5_LENGTH, padding="max_length", return_tensors="pt")
        states = model(input_ids=ids["input_ids"], attention_mask=None)["last_hidden_state"]
        return states.mean(1), states

    heads = fit("T5", model, features, rng, steps, batch_size)
    with naming(folder):
        model.save_pretrained(folder)
    return heads


def train_clip(folder: Path, texts: list[str], rng: np.random.Generator, steps: int, batch_size: int) -> Heads:
    """Tokenizer and weights of the CLIP encoder into ``folder``; returns the heads for measuring."""
    folder.mkdir(parents=True)
    model = build_clip(train_clip_tokenizer(texts, folder))
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))

    def features(batch: list[str]) -> tuple[Tensor, None]:
        # Attention is causal and the output is read at the first end token, so padding to 77 would change nothing.
        ids = tokenizer(batch, truncation=True, max_length=CLIP_LENGTH, padding="longest", return_tensors="pt")
        return model(input_ids=ids["input_ids"], attention_mask=None)["pooler_output"], None

    heads = fit("CLIP", model, features, rng, steps, batch_size)
    with naming(folder):
        model.save_pretrained(folder)
    return heads


@torch.no_grad()
def accuracy(embedder: HFEmbedder, heads: Heads, examples: list[Example]) -> dict[str, float]:
    """Share of texts whose colour, shape, motion, background and all of them the heads read from the embeddings."""
    states = embedder([e.text for e in examples]).float()
    pooled = states.mean(1) if states.ndim == 3 else states
    labels = targets(examples)
    right = torch.stack([logits.argmax(-1) == labels[:, i] for i, logits in enumerate(heads(pooled))], dim=1)
    shares = right.float().mean(0).tolist()
    return {**dict(zip(VALUES, shares, strict=True)), "all": right.all(1).float().mean().item()}


def report(name: str, embedder: HFEmbedder, heads: Heads, seed: int, count: int) -> None:
    """Print the accuracies on texts of three kinds, and the scale of the embeddings."""
    heads.eval()
    rng = np.random.default_rng([seed, 2])
    kinds: dict[str, Callable[[], Example]] = {
        "captions of training clips": lambda: clip_caption(rng, "train"),
        "captions of held-out combinations": lambda: clip_caption(rng, "held_out"),
        "unseen wordings": lambda: unseen_example(rng),
    }
    for kind, draw in kinds.items():
        shares = accuracy(embedder, heads, [draw() for _ in range(count)])
        print(f"{name:5} {kind:34}", *(f"{key} {100 * share:6.2f} %" for key, share in shares.items()))
    with torch.no_grad():
        sample = embedder([clip_caption(rng, "train").text for _ in range(64)]).float()
    print(f"{name:5} output: shape {list(sample.shape[1:])}, std {sample.std().item():.2f}")


def train_text(out: Path, seed: int, steps: int, batch_size: int, count: int, overwrite: bool) -> None:
    """Build both encoders and put their folders into ``out`` when they are whole.

    Raises:
        UserError: a folder is there already and ``overwrite`` is off, or a number is not positive.
    """
    for flag, value in (("--steps", steps), ("--batch-size", batch_size), ("--num-test", count)):
        if value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")
    for name in (T5_FOLDER, CLIP_FOLDER):
        if (out / name).exists() and not overwrite:
            raise UserError(f"{out / name} exists; give another --out or add --overwrite")
    with claimed(out):
        remove_unfinished_folders(out, SCRATCH)
        torch.manual_seed(seed)
        rng = np.random.default_rng([seed, 0])
        texts = [training_example(rng).text for _ in range(12_000)] + list(WORDS)
        scratch = temporary_path(out / SCRATCH, "writing")
        try:
            scratch.mkdir()
            _train_both(scratch, texts, rng, steps, batch_size, seed, count)
            for folder in (T5_FOLDER, CLIP_FOLDER):
                for file in (scratch / folder).iterdir():
                    file.chmod(0o644)  # safetensors writes for the owner only
                (out / folder).parent.mkdir(parents=True, exist_ok=True)
                put_in_place(scratch / folder, out / folder)
        finally:
            discard_folder(scratch)


def _train_both(
    scratch: Path, texts: list[str], rng: np.random.Generator, steps: int, batch_size: int, seed: int, count: int
) -> None:
    """Write the folders of both encoders, and say how good they are."""
    start = time.perf_counter()
    heads = {T5_FOLDER: train_t5(scratch / T5_FOLDER, texts, rng, steps, batch_size)}
    heads[CLIP_FOLDER] = train_clip(scratch / CLIP_FOLDER, texts, rng, steps, batch_size)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    for folder, length in ((T5_FOLDER, T5_LENGTH), (CLIP_FOLDER, CLIP_LENGTH)):
        embedder = HFEmbedder(str(scratch / folder), max_length=length)
        report(folder.split("/")[1].split("-")[0].upper(), embedder, heads[folder], seed, count)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder to put {T5_FOLDER} and {CLIP_FOLDER} into")
    parser.add_argument(
        "--seed", type=int, action=Bounded, least=0, most=2**40, default=0, help="seed of texts and weights"
    )
    parser.add_argument(
        "--steps", type=int, action=Bounded, least=1, most=10**7, default=700, help="training steps of each encoder"
    )
    parser.add_argument(
        "--batch-size", type=int, action=Bounded, least=1, most=2**16, default=128, help="texts per step"
    )
    parser.add_argument(
        "--num-test",
        type=int,
        action=Bounded,
        least=1,
        most=10**6,
        default=1000,
        help="texts of each kind to measure on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace folders of an earlier run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build the encoders."""
    args = parse_args(argv)
    train_text(args.out, args.seed, args.steps, args.batch_size, args.num_test, args.overwrite)


if __name__ == "__main__":
    run_main(main)
