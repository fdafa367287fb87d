"""Values that parse and cannot be, and words that look like others."""

from collections.abc import Sequence
from typing import NamedTuple

from tests.attack.cases import commands
from tests.attack.cases.commands import Command
from tests.attack.runner import Case

BUCKETS = """
{'64px': {5: 3}} | {'0px': {5: (1.0, 2)}} | {'64px_ar0:0': {5: (1.0, 2)}} | {'64px': {-5: (1.0, 2)}} | {}
{'64px': {5: (-1.0, 2)}} | {'64px': {5: (1.0, 0)}} | {'64px': {5: (1.0, 2.5)}} | {'64px': {5: (1e999, 2)}}
{'64px': {}} | {'px': {5: (1.0, 2)}} | {'64px': {'a': (1.0, 2)}} | {'64px_ar1': {5: (1.0, 2)}} | {'64px': [5]}
{'64px': {5: (1.0,)}} | {'64px': {5: (1.0, 2, 3)}} | {64: {5: (1.0, 2)}} | {None: None} | {'64px': None}
"""
PROMPTS = ("\udcff", "a" * 100_000, "\u202e", "<extra_id_0>", " ", "--", "=", "\n\n", "\U0001f600" * 99)


class Odd(NamedTuple):
    """A flag and values that are wrong, or may be (then nothing must be named)."""

    command: Command
    flag: str
    culprit: str
    values: Sequence[str]
    may_pass: bool = False


def _words(text: str) -> list[str]:
    return [word.strip() for line in text.strip().splitlines() for word in line.split("|")]


ODD = (
    Odd(commands.TRAIN, "bucket_config", "bucket|px", (*_words(BUCKETS), "[" * 5000 + "]" * 5000)),
    Odd(commands.TRAIN, "lora_config", "lora_config", ("{{1: 2}}", "{'r': 1j}", "{'r': None}", "{1: 2}", "{'r': 2.5}")),
    Odd(commands.TRAIN, "exp_name", "exp.name", ("a/../../b", "..", ".", "/abs/x", "a\nb", "~"), True),
    Odd(commands.TRAIN, "condition_config", "condition", ("{'t2v': -1}", "{'gone': 1}", "{'t2v': 0}", "{'t2v': 'x'}")),
    Odd(
        commands.TRAIN,
        "optim",
        "optim",
        ("{'cls':'Gone'}", "{'cls':'Muon','adamw_mode':False}", "{'cls':'AdamW','momentum':0.9}"),
    ),
    Odd(commands.VAE_TRAIN, "optim_discriminator.cls", "optim_discriminator", ("Gone",)),
    Odd(commands.TRAIN, "device", "device", ("cuda:-1", "cuda:99", "meta", "tpu")),
    Odd(commands.INFERENCE, "device", "device", ("cuda:-1", "cuda:99", "meta", "tpu")),
    Odd(
        commands.INFERENCE,
        "sampling_option.aspect_ratio",
        "aspect",
        ("16:0", "nan:1", "-1:1", "a:b", "1:2:3", "inf:1", "1e9:1"),
    ),
    Odd(commands.INFERENCE, "sampling_option.resolution", "resolution", ("-256px", "1e9px", "0px", "px", "many")),
    Odd(commands.INFERENCE, "dtype", "dtype", ("float8", "int8", "")),
    Odd(commands.INFERENCE, "pretrained_lora_path", "lora", ("@", "a@@1", "{good}/lora@1@1", "{good}/lora@1e400")),
    Odd(commands.FROM_TABLE, "prompt", "prompt", PROMPTS, True),
    Odd(commands.CACHE, "cache_dir", "cache", ("",)),
    Odd(commands.DATA, "stages", "stages|cut|ingest", ("cut,ingest", "ingest,ingest", "gone", "")),
)


def cases() -> list[Case]:
    """Each of them."""
    return [
        Case(
            f"{odd.command.script}-odd-{odd.flag}-{number}",
            odd.command.script,
            (*odd.command.words, f"--{odd.flag}={value}"),
            "" if odd.may_pass else f"(?i){odd.culprit}",
            may_pass=odd.may_pass,
        )
        for odd in ODD
        for number, value in enumerate(odd.values)
    ]
