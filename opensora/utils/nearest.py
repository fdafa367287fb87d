"""The key that a user probably meant."""

import difflib
from collections.abc import Iterable


def nearest_key(key: str, valid: Iterable[str]) -> str | None:
    """The valid dotted name that is most like ``key``, None if none is.

    What a key shares with its neighbours (``model.``) says nothing about which one was meant, so that last parts are
    compared: with names beside it, then in sections of its own, then anywhere; close ones first, then likely ones.
    """
    section, _, wanted = key.rpartition(".")
    names = [name for name in dict.fromkeys(valid) if name != section]
    beside = [name for name in names if name.rpartition(".")[0] == section]
    inside = [name for name in names if name.startswith(f"{section}." if section else "")]
    if not beside:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.8)  # the section is misspelled
        if near:
            return near[0]
    for cutoff in (0.8, 0.6):
        for candidates in (beside, inside, names):
            by_last = {name.rpartition(".")[2]: name for name in reversed(candidates)}
            near = difflib.get_close_matches(wanted, by_last, n=1, cutoff=cutoff)
            if near:
                return by_last[near[0]]
    return None
