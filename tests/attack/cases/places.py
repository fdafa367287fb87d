"""Every path of every command, with what cannot be a file or folder there."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.attack.cases import commands
from tests.attack.cases.commands import Command
from tests.attack.runner import Case

LONG = "n" * 300


def _loop(own: Path, suffix: str) -> None:
    (own / f"loop{suffix}").symlink_to(f"loop{suffix}")


def _dangling(own: Path, suffix: str) -> None:
    (own / f"dangling{suffix}").symlink_to("nowhere")


def _file(own: Path, suffix: str) -> None:
    (own / f"file{suffix}").write_bytes(b"\x80not what is due\x00\xff" * 9)


def _empty(own: Path, suffix: str) -> None:
    (own / f"empty{suffix}").write_bytes(b"")


def _folder(own: Path, suffix: str) -> None:
    (own / f"folder{suffix}").mkdir()


def _pipe(own: Path, suffix: str) -> None:
    os.mkfifo(own / f"pipe{suffix}")


def _nothing(own: Path, suffix: str) -> None:
    pass


class Bad(NamedTuple):
    """A place, by name, and what makes it."""

    name: str
    make: Callable[[Path, str], None] = _nothing


INPUTS = {
    "missing": Bad("missing"),
    "long": Bad(LONG),
    "loop": Bad("loop", _loop),
    "dangling": Bad("dangling", _dangling),
    "junk": Bad("file", _file),
    "empty": Bad("empty", _empty),
    "folder": Bad("folder", _folder),
    "below a file": Bad("file/x", lambda own, suffix: _file(own, "")),
    "pipe": Bad("pipe", _pipe),
}
OUTPUTS = {
    "long": Bad(LONG),
    "long folder": Bad(f"{LONG}/x"),
    "loop": Bad("loop", _loop),
    "below a loop": Bad("loop/x", lambda own, suffix: _loop(own, "")),
    "below a file": Bad("file/x", lambda own, suffix: _file(own, "")),
    "below a device": Bad("/dev/null/x"),
}
OUT_FILES = {**OUTPUTS, "folder": Bad("folder", _folder)}
OUT_FOLDERS = {**OUTPUTS, "file": Bad("file", _file)}


class Place(NamedTuple):
    """Where a command takes a path: the flag, or the words before and after it; the ending that is due; what is bad."""

    command: Command
    flag: str
    suffix: str
    bad: Mapping[str, Bad]
    besides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def _only(bad: Mapping[str, Bad], *left_out: str) -> dict[str, Bad]:
    return {name: place for name, place in bad.items() if name not in left_out}


FUSED = ("--qkv", "fused")
WITH_DATA = ("{good}/infer.py", "--data", "{good}/demo/clips.csv")
I2V = ("--cond_type", "i2v_head")
ADAPTER = ("--lora-config", "{'r': 2, 'target_modules': ['linear1']}", "--model.from_pretrained", "{good}/checkpoint")
PLACES = (
    Place(commands.INFERENCE, "", ".py", _only(INPUTS, "junk", "empty")),
    Place(commands.INFERENCE, "--save-dir", "", OUT_FOLDERS),
    Place(commands.INFERENCE, "--ref", ".png", INPUTS, I2V),
    Place(commands.INFERENCE, "--ref", ".mp4", INPUTS, I2V),
    Place(commands.INFERENCE, "--model.from_pretrained", ".safetensors", INPUTS),
    Place(commands.INFERENCE, "--model.from_pretrained", ".pt", INPUTS),
    Place(commands.INFERENCE, "--model.from_pretrained", "", INPUTS),
    Place(commands.INFERENCE, "--ae.from_pretrained", ".safetensors", INPUTS),
    Place(commands.INFERENCE, "--t5.from_pretrained", "", INPUTS),
    Place(commands.INFERENCE, "--clip.from_pretrained", "", INPUTS),
    Place(commands.INFERENCE, "--pretrained-lora-path", "", INPUTS),
    Place(commands.FROM_TABLE, "--dataset.data-path", ".csv", INPUTS),
    Place(commands.FROM_TABLE, "--dataset.data-path", ".parquet", INPUTS),
    Place(commands.DECODE, "", ".latents.safetensors", INPUTS),
    Place(commands.DECODE, "--ae.from_pretrained", ".safetensors", INPUTS),
    Place(commands.TRAIN, "", ".py", _only(INPUTS, "junk", "empty")),
    Place(commands.TRAIN, "--outputs", "", OUT_FOLDERS),
    Place(commands.TRAIN, "--load", "", INPUTS),
    Place(commands.TRAIN, "--dataset.data-path", ".csv", INPUTS),
    Place(commands.TRAIN, "--dataset.data-path", ".parquet", INPUTS),
    Place(commands.TRAIN, "--model.from_pretrained", ".safetensors", INPUTS),
    Place(commands.TRAIN, "--ae.from_pretrained", ".safetensors", INPUTS),
    Place(commands.TRAIN, "--t5.from_pretrained", "", INPUTS),
    Place(commands.TRAIN, "--clip.from_pretrained", "", INPUTS),
    Place(commands.TRAIN, "--cache-dir", "", INPUTS, ("--cached-video", "True")),
    Place(commands.TRAIN, "--cache-dir", "", INPUTS, ("--cached-text", "True")),
    Place(commands.TRAIN, "--validation.data_path", ".csv", INPUTS),
    Place(commands.TRAIN, "--lora-checkpoint", "", INPUTS, ADAPTER),
    Place(commands.CACHE, "--cache-dir", "", OUT_FOLDERS),
    Place(commands.CACHE, "--dataset.data-path", ".csv", INPUTS),
    Place(commands.CACHE, "--ae.from_pretrained", ".safetensors", INPUTS),
    Place(commands.CACHE, "--t5.from_pretrained", "", INPUTS),
    Place(commands.VAE_TRAIN, "--outputs", "", OUT_FOLDERS),
    Place(commands.VAE_TRAIN, "--load", "", INPUTS),
    Place(commands.VAE_TRAIN, "--model.from_pretrained", ".safetensors", INPUTS),
    Place(commands.VAE_TRAIN, "--dataset.data-path", ".csv", INPUTS),
    Place(commands.VAE_INFERENCE, "--save-dir", "", OUT_FOLDERS),
    Place(commands.VAE_INFERENCE, "--dataset.data-path", ".csv", INPUTS),
    Place(commands.VAE_INFERENCE, "--dataset.data-path", "", INPUTS),
    Place(commands.VAE_INFERENCE, "--model.from_pretrained", ".safetensors", INPUTS),
    Place(commands.VAE_STATS, "--dataset.data-path", ".csv", INPUTS),
    Place(commands.VAE_STATS, "--model.from_pretrained", ".safetensors", INPUTS),
    Place(commands.META, "--input", ".csv", INPUTS),
    Place(commands.META, "--output", ".csv", OUT_FILES),
    Place(Command("scripts/cnv/shard.py", ()), "", ".parquet", INPUTS),
    Place(commands.DATA, "--input", "", INPUTS),
    Place(commands.DATA, "--input", ".csv", INPUTS),
    Place(commands.DATA, "--output", "", OUT_FOLDERS),
    *(
        Place(Command(f"tools/data/{name}.py", ()), "", "", _only(INPUTS, "folder"))
        for name in ("status", "export", "stats", "sheet")
    ),
    Place(Command("tools/data/export.py", ("{good}/made",)), "--out", ".csv", OUT_FILES),
    Place(Command("tools/data/stats.py", ("{good}/made",)), "--out", "", OUT_FOLDERS),
    Place(Command("tools/data/table.py", ("--out", "out.csv")), "", ".csv", INPUTS),
    Place(Command("tools/data/table.py", ("--out", "out.csv")), "", ".parquet", INPUTS),
    Place(Command("tools/data/table.py", ("{good}/clips.csv",)), "--out", ".csv", OUT_FILES),
    Place(Command("tools/data/table.py", ("{good}/clips.csv", "--out", "out.csv")), "--join", ".csv", INPUTS),
    Place(Command("tools/data/table.py", ("{good}/clips.csv", "--out", "out.csv")), "--subtract", ".csv", INPUTS),
    Place(Command("tools/data/sample_footage.py", ()), "--out", "", OUT_FOLDERS),
    Place(Command("tools/demo/draw_picture.py", ()), "--out", ".png", OUT_FILES),
    Place(Command("tools/demo/make_clips.py", ("--num", "1", "--seed", "0")), "--out", "", OUT_FOLDERS),
    Place(Command("tools/demo/evaluate.py", ("{good}/infer.py",)), "--out", "", OUT_FOLDERS),
    *(
        Place(Command(f"tools/demo/{name}.py", ("{good}/infer.py", "--resolution", "64px")), "--out", "", OUT_FOLDERS)
        for name in ("evaluate_long", "evaluate_frames")
    ),
    Place(Command("tools/demo/evaluate_vae.py", ("{good}/infer.py", "--out", "out")), "--data", ".csv", INPUTS),
    Place(
        Command("tools/demo/evaluate_vae.py", ("{good}/infer.py", "--data", "{good}/demo/clips.csv")),
        "--out",
        "",
        OUT_FOLDERS,
    ),
    Place(Command("tools/demo/train_text.py", ("--steps", "1")), "--out", "", OUT_FOLDERS),
    *(
        Place(Command(f"tools/convert/{name}.py", (), ("out.safetensors", *words)), "", suffix, INPUTS)
        for name, *words in (("mmdit", "--qkv", "fused"), ("checkpoint",), ("from_diffusers",))
        for suffix in (".safetensors", "")
    ),
    Place(Command("tools/convert/mmdit.py", ("{demo}/mmdit.safetensors",), FUSED), "", ".safetensors", OUT_FILES),
)


def cases() -> list[Case]:
    """Every place with everything that is bad there."""
    found: dict[str, Case] = {}
    for place in PLACES:
        for label, bad in place.bad.items():
            case = _case(place, label, bad)
            found[case.name] = case
    return list(found.values())


def _case(place: Place, label: str, bad: Bad) -> Case:
    def make(good: Path, own: Path) -> None:
        bad.make(own, place.suffix)

    path = bad.name if bad.name.startswith("/") else f"{{case}}/{bad.name}"
    path += "" if "/" in bad.name else place.suffix
    words = place.command.with_path(path, place.flag)
    name = f"{place.command.script}-{place.flag or 'word'}{place.suffix}-{'-'.join(place.besides)[:20]}-{label}"
    culprit = "n{30}" if LONG in path else bad.name.partition("/")[0] or "null"
    return Case(name, place.command.script, (*words, *place.besides), culprit, make)
