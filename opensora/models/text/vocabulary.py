"""Whether the vocabulary beside a text encoder is whole and the encoder's own, before the encoder is loaded."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opensora.utils.paths import is_file, is_folder, is_there, read_text

WHOLE_TOKENIZER = "tokenizer.json"  # takes the place of all others
TOKENIZER_FILES = {"t5": ("spiece.model",), "clip": ("vocab.json", "merges.txt")}
READ_WHOLE = (".json", ".txt", ".model")  # of which a tokenizer reads some: a pipe would keep it waiting
SPECIAL = re.compile(r"<.+>")  # tokens that stand for no text
WORD_END = "</w>"
ODD_SHARE = 0.01  # of a vocabulary, that may be spelled by no merge: words that somebody has added


def wrong_vocabulary(folder: Path, kind: str, size: int) -> str | None:
    """What is wrong with a tokenizer, None if it can be used.

    Args:
        folder: of its files.
        kind: of encoder, ``t5`` or ``clip``.
        size: how many tokens the encoder has embeddings of.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_WHOLE and is_there(path) and not is_file(path) and not is_folder(path):
            return f"its {path.name} is a pipe or a device, no file"
    absent = [name for name in TOKENIZER_FILES[kind] if not (folder / name).is_file()]
    is_whole = (folder / WHOLE_TOKENIZER).is_file()
    if absent and not is_whole:
        return f"its tokenizer lacks {', '.join(absent)}"
    name = WHOLE_TOKENIZER if is_whole else TOKENIZER_FILES[kind][0]
    try:
        tokens = READERS[name](folder)
        number = max(tokens.values()) + 1
    except Exception as error:  # of JSON, protobuf and tokenizers, each with kinds of their own
        said = str(error).partition("\n")[0]
        return f"its {name} is damaged or cut short ({said})"
    if number > size:
        return f"its {name} has {number} tokens, its config.json says vocab_size={size}: one of the two is wrong"
    return _wrong_merges(folder, tokens) if name == "vocab.json" else None


def _read_pieces(folder: Path) -> dict[str, int]:
    """Pieces of a SentencePiece model.

    Raises:
        ValueError: parts of it are missing, as where a file ends between two pieces.
    """
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # whose classes are made when it is imported
    if not is_file(folder / "spiece.model"):
        raise ValueError("no such file")
    model = messages.ModelProto()
    model.ParseFromString((folder / "spiece.model").read_bytes())
    if not (model.pieces and model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise ValueError("it ends before its settings")
    return {piece.piece: number for number, piece in enumerate(model.pieces)}


def _read_words(folder: Path) -> dict[str, int]:
    words: dict[str, int] = json.loads(read_text(folder / "vocab.json"))
    if not words or not all(isinstance(number, int) and number >= 0 for number in words.values()):
        raise ValueError("no table of tokens and their numbers")
    return words


def _read_whole(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(read_text(folder / WHOLE_TOKENIZER)).get_vocab()


READERS: Mapping[str, Callable[[Path], dict[str, int]]] = MappingProxyType(
    {"spiece.model": _read_pieces, "vocab.json": _read_words, WHOLE_TOKENIZER: _read_whole}
)
"""By name of a file, what reads its tokens and their numbers; it raises any error if it cannot."""


def _wrong_merges(folder: Path, words: Mapping[str, int]) -> str | None:
    """What is wrong with the merges of a byte-pair vocabulary: each makes a word of two, and all longer words are made
    so."""
    try:
        lines = read_text(folder / "merges.txt").split("\n")
    except UnicodeDecodeError:
        return "its merges.txt is damaged (not UTF-8)"
    merges = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#version")]
    for number, line in merges:
        if len(line.split()) != 2 or "".join(line.split()) not in words:
            return f"its merges.txt is damaged or cut short, or not of its vocab.json (line {number}: {line!r})"
    unmade = _unmade(words, {"".join(line.split()) for _, line in merges})
    if len(unmade) > ODD_SHARE * len(words):
        return (
            f"its merges.txt is cut short, or not of its vocab.json: {len(unmade)} tokens are made by none of its lines"
        )
    return None


def _unmade(words: Iterable[str], made: set[str]) -> list[str]:
    return [
        word
        for word in words
        if len(word.removesuffix(WORD_END)) > 1 and word not in made and SPECIAL.fullmatch(word) is None
    ]
