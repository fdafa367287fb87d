"""Good files with a few bytes changed, by fixed seeds: what reads them finds them fine or names them, and ends."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.attack.cases import commands
from tests.attack.cases.commands import Command
from tests.attack.inputs import DEMO, copy_writable
from tests.attack.runner import Case

ROUNDS = 8
V2V = ("--cond_type", "v2v_head", "--num_frames", "37")
I2V = ("--cond_type", "i2v_head")


def mutate(whole: bytes, seed: int) -> bytes:
    """Some bytes flipped, set, cut out, put in or doubled; more of them near the start, where headers are."""
    source, changed = random.Random(seed), bytearray(whole)
    for _ in range(source.choice((1, 2, 8, 40))):
        span = max(1, len(changed) if source.random() < 0.5 else min(len(changed), 400))
        at, size = source.randrange(span), source.choice((1, 1, 4, 64))
        kind = source.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            changed[at : at + size] = bytes([source.choice((0, 127, 255))]) * size
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = source.randbytes(size)
        else:
            changed[at:at] = changed[at : at + size]
    return bytes(changed[: source.randrange(len(changed) + 1)] if source.random() < 0.1 else changed)


class Target(NamedTuple):
    """A good file (below the good inputs or the demo's weights), and the command line that reads a copy of it.

    Attributes:
        copied: what is copied into the case's folder: the file, or a folder that it is in.
        words: with ``{case}`` for that copy.
    """

    name: str
    copied: str
    file: str
    command: Command
    words: Sequence[str]


META = Command("scripts/cnv/meta.py", ("--output", "out.csv", "--num_workers", "0"))
CONVERT = Command("tools/convert/mmdit.py", ())
FUSED = ("o.safetensors", "--qkv", "fused")
DECODE = Command(commands.DECODE.script, ("{good}/infer.py",))
T5, CLIP = "{demo}/google/t5-demo", "{demo}/openai/clip-demo"
STATES = "running_states.json"
TARGETS = (
    Target("picture", "picture.png", "", commands.INFERENCE, (*I2V, "--ref", "{copy}")),
    Target("clip as reference", "long.mp4", "", commands.INFERENCE, (*V2V, "--ref", "{copy}")),
    Target("prompts", "prompts.csv", "", commands.FROM_TABLE, ("--dataset.data-path", "{copy}")),
    Target("prompts", "prompts.parquet", "", commands.FROM_TABLE, ("--dataset.data-path", "{copy}")),
    Target("clips", "clips.csv", "", commands.TRAIN, ("--dataset.data-path", "{copy}")),
    Target("clips", "clips.parquet", "", commands.TRAIN, ("--dataset.data-path", "{copy}")),
    Target("clips", "clips.csv", "", commands.VAE_INFERENCE, ("--dataset.data-path", "{copy}")),
    Target("config", "infer.py", "", Command(commands.INFERENCE.script, ()), ("{copy}", "--prompt", "a")),
    Target("weights", "{demo}/mmdit.safetensors", "", commands.INFERENCE, ("--model.from_pretrained", "{copy}")),
    Target("weights", "{demo}/vae.safetensors", "", commands.VAE_INFERENCE, ("--model.from_pretrained", "{copy}")),
    Target("pickle", "weights.pt", "", commands.INFERENCE, ("--model.from_pretrained", "{copy}")),
    Target("old pickle", "old.pt", "", commands.INFERENCE, ("--model.from_pretrained", "{copy}")),
    Target("T5", T5, "config.json", commands.INFERENCE, ("--t5.from_pretrained", "{copy}")),
    Target("CLIP", CLIP, "config.json", commands.INFERENCE, ("--clip.from_pretrained", "{copy}")),
    Target("adapter", "lora", "adapter_config.json", commands.INFERENCE, ("--pretrained-lora-path", "{copy}")),
    Target("adapter", "lora", "adapter_model.safetensors", commands.INFERENCE, ("--pretrained-lora-path", "{copy}")),
    Target("latents", "sample.latents.safetensors", "", DECODE, ("{copy}",)),
    Target("checkpoint", "checkpoint", STATES, commands.TRAIN, ("--load", "{copy}", "--max_steps", "2")),
    Target("cache", "cache", "cache.json", commands.TRAIN, ("--cache-dir", "{copy}", "--cached-video", "True")),
    Target("cache", "cache", "index.parquet", commands.TRAIN, ("--cache-dir", "{copy}", "--cached-text", "True")),
    Target("cache", "cache", "cache.json", commands.CACHE, ("--cache-dir", "{copy}")),
    Target("meta", "clips.csv", "", commands.META, ("--input", "{copy}")),
    Target("shard", "clips.parquet", "", Command("scripts/cnv/shard.py", ()), ("{copy}", "2")),
    Target("footage", "clips.csv", "", commands.DATA, ("--input", "{copy}")),
    Target("status", "made", "funnel.json", Command("tools/data/status.py", ()), ("{copy}",)),
    Target("status", "made", "table.parquet", Command("tools/data/status.py", ()), ("{copy}",)),
    Target("export", "made", "table.parquet", Command("tools/data/export.py", ("--out", "out.csv")), ("{copy}",)),
    Target("table", "clips.csv", "", Command("tools/data/table.py", ("--out", "out.parquet")), ("{copy}",)),
    Target("table", "clips.parquet", "", Command("tools/data/table.py", ("--out", "out.csv")), ("{copy}",)),
    Target("mmdit", "{demo}/mmdit.safetensors", "", CONVERT, ("{copy}", *FUSED)),
    Target("meta of a clip", "footage/0.mp4", "", META, ("--input", "{table}")),
    Target("clip", "footage/0.mp4", "", commands.TRAIN, ("--dataset.data-path", "{table}")),
    Target("clip", "footage/0.mp4", "", commands.VAE_INFERENCE, ("--dataset.data-path", "{table}")),
    Target("picture", "picture.png", "", META, ("--input", "{table}")),
    Target("footage", "footage/0.mp4", "", commands.DATA, ("--input", "{table}")),
)


def cases() -> list[Case]:
    """Every target, changed in several ways."""
    return [_case(target, seed) for target in TARGETS for seed in range(ROUNDS)]


def _case(target: Target, seed: int) -> Case:
    copy = Path(target.copied).name
    name = f"{target.command.script}-fuzz-{target.name}-{target.file or copy}-{seed}"
    places = {"{copy}": f"{{case}}/{copy}", "{table}": "{case}/table.csv"}
    words = [places.get(word, word) for word in target.words]
    culprit = "" if target.name == "config" else f"{copy.partition('.')[0]}|table"
    may_leave = "out_broken.csv" if target.command.script == commands.META.script else ""
    return Case(
        name,
        target.command.script,
        (*target.command.words, *words),
        culprit,
        _make(target, seed),
        True,
        leaves=may_leave,
    )


def _make(target: Target, seed: int) -> Callable[[Path, Path], None]:
    def make(good: Path, own: Path) -> None:
        source = Path(target.copied.replace("{demo}", str(DEMO)))
        copy = copy_writable(good / source, own / source.name)
        changed = copy / target.file if target.file else copy
        changed.write_bytes(mutate(changed.read_bytes(), seed))
        rows = [f"{path},a,9,64,64,8\n" for path in (copy, good / "footage" / "1.mp4")]
        (own / "table.csv").write_text("path,text,num_frames,height,width,fps\n" + "".join(rows))

    return make
