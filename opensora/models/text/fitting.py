"""What a text encoder cannot take of texts: too many tokens, words that it does not know."""

import re
from collections.abc import Sequence
from typing import Any

from opensora.utils.errors import shorten
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

# What generation and training append: "... 24 FPS. 4 motion score.", "... 24 FPS, 4 motion score."
SUFFIX = re.compile(r"(?: [\d.e+-]+ FPS[.,])?(?: \S+ motion score\.)?$")
SHOWN_LETTERS = 60  # of a text, in a message


def suffix_of(text: str) -> str:
    """Frame rate and motion score at the end of a text; empty without."""
    found = SUFFIX.search(text)
    return found.group().strip() if found else ""


def count_notes(*encoders: Any) -> None:
    """Let encoders count what they do not take, rather than say it of every text; of another kind, they say nothing."""
    for notes in (getattr(encoder, "notes", None) for encoder in encoders):
        if isinstance(notes, TextNotes):
            notes.counted = True


class TextNotes:
    """Says in the log what an encoder does not take, once per text; or, where texts are many, only counts.

    Args:
        encoder: its name for messages.
        limit: tokens that it takes.
        counted: say the first text, and then how many there were so far, at 10, 100, 1000, ...
    """

    def __init__(self, encoder: str, limit: int, counted: bool = False) -> None:
        self.encoder, self.limit, self.counted = encoder, limit, counted
        self._told: dict[str, set[int]] = {"cut": set(), "unknown": set()}

    def cut(self, text: str, tokens: int, kept: str) -> None:
        """A text is longer than the limit.

        Args:
            text: as it is.
            tokens: all of its tokens.
            kept: its end, if that is kept.
        """
        what = f"{tokens - self.limit} of {tokens} tokens are lost, from before '{kept}'" if kept else ""
        what = what or f"the last {tokens - self.limit} of {tokens} tokens are lost"
        self._say("cut", text, f"texts are cut to {self.limit} tokens", what)

    def unknown(self, text: str, words: Sequence[str]) -> None:
        """A text has words that the tokenizer has no tokens for."""
        self._say("unknown", text, "texts have words that the tokenizer does not know and drops", shorten(words))

    def _say(self, kind: str, text: str, what: str, detail: str) -> None:
        told = self._told[kind]
        if hash(text) in told:
            return
        told.add(hash(text))
        count, shown = len(told), text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
        if not self.counted or count == 1:
            more = "; further ones are counted" if self.counted else ""
            logger.warning("%s: %s: %s ('%s')%s", self.encoder, what, detail, shown, more)
        elif str(count).strip("0") == "1":
            logger.warning("%s: %s: %d so far", self.encoder, what, count)
