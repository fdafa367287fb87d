"""The two small tokenizers of the demo: a sentencepiece model for T5, byte-level pair encoding for CLIP."""

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer

from opensora.utils.files import write_beside, write_text

T5_VOCABULARY = 1200
T5_EXTRA_IDS = 0  # the demo needs none of T5's sentinel tokens
CLIP_MERGES = 600
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's split into words: contractions, letters, single digits, runs of anything else.
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_t5_tokenizer(texts: Iterable[str], folder: Path) -> int:
    """Write ``spiece.model`` and ``tokenizer_config.json``; returns the size of the vocabulary.

    Case is folded. Characters beyond ASCII and the texts become ``<unk>``, as in the released T5 (the tokenizers of
    transformers would not use byte pieces for them).
    """
    texts = list(texts)
    # The trainer only considers pieces that occur in at least two different words, so each word also comes with marks.
    words = sorted({word.strip(string.punctuation).lower() for text in texts for word in text.split()} - {""})
    # Endings keep some parts of words in the vocabulary, for words not met before.
    texts += [word + mark for word in words for mark in ("", ".", ",")]
    texts += [word + ending for word in words for ending in ("ing", "er", "ed", "ly", "est", "ation", "ies")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_VOCABULARY,
        hard_vocab_limit=False,
        required_chars=string.digits + string.ascii_lowercase + string.punctuation + _other_letters(texts),
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        num_threads=1,  # more would make the result depend on the machine
        minloglevel=2,
    )
    write_beside(folder / "spiece.model", lambda temporary: temporary.write_bytes(model.getvalue()))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": T5_EXTRA_IDS,
    }
    _write_json(folder / "tokenizer_config.json", config)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size() + T5_EXTRA_IDS


def _other_letters(texts: Iterable[str]) -> str:
    """Letters beyond ASCII; the trainer would leave out the rarest."""
    return "".join(sorted({letter for text in texts for letter in text if letter.isalpha() and not letter.isascii()}))


def train_clip_tokenizer(texts: Iterable[str], folder: Path) -> int:
    """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``; returns the size of the vocabulary.

    The vocabulary is laid out as OpenAI's: all bytes, all bytes at the end of a word, one token per merge, start, end.
    """
    trained = tokenizers.Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer = Normalizers([NFC(), Replace(tokenizers.Regex(r"\s+"), " "), Lowercase()])
    split = Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    trained.pre_tokenizer = PreTokenizers([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=2 * len(alphabet) + CLIP_MERGES,
        # The trainer breaks ties by token number, and numbers last letters in random order unless they are given here.
        special_tokens=[f"{byte}</w>" for byte in alphabet],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"][:CLIP_MERGES]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), START, END]
    tokens = list(dict.fromkeys(tokens))
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_text("\n".join(lines) + "\n", folder / "merges.txt")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    _write_json(folder / "tokenizer_config.json", config)
    return len(tokens)


def _write_json(path: Path, value: object) -> None:
    write_text(json.dumps(value, ensure_ascii=False, indent=None) + "\n", path)
