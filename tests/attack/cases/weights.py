"""Every section that reads weights, with files that are damaged, of another kind, or of another model."""

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.attack.cases import commands
from tests.attack.cases.commands import Command
from tests.attack.inputs import CLIP, DEMO, T5, write_adapter
from tests.attack.runner import Case

Write = Callable[[bytes], bytes]


def _header(change: Callable[[dict], object]) -> Write:
    """Change the header of a safetensors file."""

    def write(whole: bytes) -> bytes:
        size = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + size])
        first = next(name for name in header if name != "__metadata__")
        changed = change({"header": header, "first": header[first], "name": first})
        text = json.dumps(header if changed is None else changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    return write


class _Code:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("touched"),)


def _pickled(content: object) -> Write:
    def write(whole: bytes) -> bytes:
        out = io.BytesIO()
        torch.save(content, out)
        return out.getvalue()

    return write


SAFETENSORS: Mapping[str, Write] = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut in the header": lambda whole: whole[:100],
    "eight bytes": lambda whole: whole[:8],
    "long header": lambda whole: struct.pack("<Q", 2**60) + whole[8:],
    "header of zeros": lambda whole: whole[:8] + b"\0" * 2000 + whole[2008:],
    "lfs": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "page": lambda whole: b"<html>404</html>" * 50,
    "offsets": _header(lambda at: at["first"].update(data_offsets=[0, 2**40])),
    "shape": _header(lambda at: at["first"].update(shape=[2**40])),
    "negative shape": _header(lambda at: at["first"].update(shape=[-1])),
    "type": _header(lambda at: at["first"].update(dtype="X99")),
    "list": _header(lambda at: [1]),
    "no tensors": _header(lambda at: {"__metadata__": {}}),
    "other name": _header(lambda at: at["header"].update(other=at["header"].pop(at["name"]))),
    "one less": lambda whole: _dump({k: v for i, (k, v) in enumerate(_load(whole).items()) if i}),
    "one more": lambda whole: _dump({**_load(whole), "further": torch.zeros(1)}),
    "integers": lambda whole: _dump({k: v.to(torch.int32) for k, v in _load(whole).items()}),
    "scalars": lambda whole: _dump({k: torch.zeros(()) for k in _load(whole)}),
}
PICKLES: Mapping[str, Write] = {
    "code": lambda whole: pickle.dumps(_Code()),
    "code in torch": _pickled({"a": _Code()}),
    "text": _pickled("text"),
    "numbers": _pickled({"a": 1}),
    "list": _pickled([torch.zeros(1)]),
    "no tensors": _pickled({}),
    "other": _pickled({"a": torch.zeros(1)}),
    "nested": _pickled({"model": {"model": {"a": torch.zeros(2)}}}),
    "junk": lambda whole: b"junk" * 100,
    "zip": lambda whole: b"PK\x03\x04" + b"\0" * 100,
    "old pickle": lambda whole: pickle.dumps({"a": [1]}),
}


def _load(whole: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(whole)


def _dump(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors)


class Section(NamedTuple):
    """A section of a command that reads a weight file, and the file that is right."""

    command: Command
    key: str
    right: Path
    others: Mapping[str, Path]


OTHERS = {
    "diffusion": DEMO / "mmdit.safetensors",
    "autoencoder": DEMO / "vae.safetensors",
    "t5": T5 / "model.safetensors",
    "folder of t5": T5,
    "folder of clip": CLIP,
}


def _others(right: str) -> dict[str, Path]:
    return {label: path for label, path in OTHERS.items() if label != right}


SECTIONS = (
    Section(commands.INFERENCE, "model", OTHERS["diffusion"], _others("diffusion")),
    Section(commands.INFERENCE, "ae", OTHERS["autoencoder"], _others("autoencoder")),
    Section(commands.DECODE, "ae", OTHERS["autoencoder"], _others("autoencoder")),
    Section(commands.TRAIN, "ae", OTHERS["autoencoder"], _others("autoencoder")),
    Section(commands.CACHE, "ae", OTHERS["autoencoder"], _others("autoencoder")),
    Section(commands.VAE_TRAIN, "model", OTHERS["autoencoder"], _others("autoencoder")),
    Section(commands.VAE_INFERENCE, "model", OTHERS["autoencoder"], _others("autoencoder")),
    Section(commands.VAE_STATS, "model", OTHERS["autoencoder"], _others("autoencoder")),
)
ENCODERS = tuple(
    (command, key, own, other)
    for command in (commands.INFERENCE, commands.TRAIN, commands.CACHE)
    for key, own, other in (("t5", T5, CLIP), ("clip", CLIP, T5))
)


def cases() -> list[Case]:
    """Weights of every section, encoders, adapters, sources of conversions."""
    found = []
    for section in SECTIONS:
        found += [_file(section, label, ".safetensors", write) for label, write in SAFETENSORS.items()]
        found += [_file(section, label, ".pt", write) for label, write in PICKLES.items()]
        found += [_other(section, label, path) for label, path in section.others.items()]
    for command, key, own, other in ENCODERS:
        found += _encoder_cases(command, key, own, other)
    return [*found, *_adapter_cases(), *_sources()]


def _file(section: Section, label: str, suffix: str, write: Write) -> Case:
    def make(good: Path, own: Path) -> None:
        (own / f"w{suffix}").write_bytes(write(section.right.read_bytes()))

    words = (*section.command.words, f"--{section.key}.from_pretrained={{case}}/w{suffix}")
    name = f"{section.command.script}-{section.key}{suffix}-{label}"
    return Case(name, section.command.script, words, "w\\.", make, late=section.key == "ae")


def _other(section: Section, label: str, path: Path) -> Case:
    words = (*section.command.words, f"--{section.key}.from_pretrained={path}")
    name = f"{section.command.script}-{section.key}-{label}"
    return Case(name, section.command.script, words, path.name, late=section.key == "ae")


def _encoder_cases(command: Command, key: str, own: Path, other: Path) -> list[Case]:
    def changed(change: Callable[[Path], None]) -> Callable[[Path, Path], None]:
        def make(good: Path, folder: Path) -> None:
            shutil.copytree(own, folder / "encoder")
            change(folder / "encoder")

        return make

    def cut(name: str, size: int) -> Callable[[Path], None]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])  # type: ignore[func-returns-value]

    def config(**keys: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            content = {**json.loads((folder / "config.json").read_text()), **keys}
            (folder / "config.json").write_text(json.dumps(content))

        return change

    depth = "num_layers" if own == T5 else "num_hidden_layers"
    width = "d_model" if own == T5 else "hidden_size"
    makes = {
        "weights cut": cut("model.safetensors", 3000),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "config cut": cut("config.json", 40),
        "config empty": cut("config.json", 0),
        "config a list": lambda folder: (folder / "config.json").write_text("[]"),
        "fewer layers": config(**{depth: 1}),
        "more layers": config(**{depth: 9}),
        "no layers": config(**{depth: 0}),
        "layers of text": config(**{depth: "x"}),
        "other width": config(**{width: 48}),
        "other model": config(model_type="bert"),
        "no model": config(model_type=None),
        "vocabulary": config(vocab_size=7),
        **{f"no {path.name}": _unlink(path.name) for path in own.iterdir() if _is_vocabulary(path)},
        **{f"{path.name} cut": cut(path.name, 50) for path in own.iterdir() if _is_vocabulary(path)},
        **{f"{path.name} a pipe": _as_pipe(path.name) for path in own.iterdir() if path.suffix in (".json", ".model")},
    }
    flag = f"--{key}.from_pretrained="
    start = f"{command.script}-{key}"
    swapped = Case(f"{start}-swapped", command.script, (*command.words, f"{flag}{other}"), other.name)
    return [
        swapped,
        *(
            Case(
                f"{start}-{label}",
                command.script,
                (*command.words, f"{flag}{{case}}/encoder"),
                "encoder",
                changed(make),
            )
            for label, make in makes.items()
        ),
    ]


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _as_pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def _is_vocabulary(path: Path) -> bool:
    return path.name in ("spiece.model", "merges.txt", "vocab.json")


def _adapter_cases() -> list[Case]:
    def settings(**keys: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            write_adapter(folder)
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

        return change

    def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_adapter(folder)
            file = folder / "adapter_model.safetensors"
            save_file(change(load_file(file)), file)

        return make

    def replaced(name: str, content: bytes) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_adapter(folder)
            (folder / name).write_bytes(content)

        return make

    makes = {
        "other module": lambda folder: write_adapter(folder, "img_attn_nothing"),
        "other width": lambda folder: write_adapter(folder, width=48),
        "rank": settings(r=5),
        "rank of text": settings(r="x"),
        "no rank": settings(r=0),
        "other method": settings(peft_type="IA3"),
        "no method": settings(peft_type="NOTHING"),
        "unknown targets": settings(target_modules=["gone"]),
        "no tensors": tensors(lambda state: {}),
        "half": tensors(lambda state: dict(list(state.items())[:1])),
        "other names": tensors(lambda state: {f"x.{key}": value for key, value in state.items()}),
        "not finite": tensors(lambda state: {key: value + float("nan") for key, value in state.items()}),
        "config empty": replaced("adapter_config.json", b""),
        "config junk": replaced("adapter_config.json", b"\x80junk"),
        "config a list": replaced("adapter_config.json", b"[]"),
        "weights junk": replaced("adapter_model.safetensors", b"junk" * 9),
        "weights empty": replaced("adapter_model.safetensors", b""),
    }
    command = commands.INFERENCE
    found = [
        Case(
            f"{command.script}-lora-{label}",
            command.script,
            (*command.words, "--pretrained-lora-path", "{case}/adapter"),
            "adapter",
            lambda good, own, make=make: make(own / "adapter"),
            late=True,
        )
        for label, make in makes.items()
    ]
    for strength in ("nan", "inf", "x", ""):
        words = (*command.words, "--pretrained-lora-path", f"{{good}}/lora@{strength}")
        found.append(Case(f"{command.script}-lora-strength-{strength}", command.script, words, "lora"))
    return found


def _sources() -> list[Case]:
    found = []
    for script, words in (("mmdit", ("--qkv", "fused")), ("from_diffusers", ())):
        for label, write in SAFETENSORS.items():

            def make(good: Path, own: Path, write: Write = write) -> None:
                (own / "w.safetensors").write_bytes(write(OTHERS["diffusion"].read_bytes()))

            name = f"tools/convert/{script}.py"
            line = ("{case}/w.safetensors", "out.safetensors", *words)
            may_pass = script == "mmdit" and label in ("one more", "integers", "one less", "other name")
            found.append(Case(f"{name}-{label}", name, line, "w\\.safe", make, may_pass, late=True))
    return found
