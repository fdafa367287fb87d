"""A Dockerfile as its instructions."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from opensora.utils.errors import UserError

NAMES = (
    *("FROM", "ENV", "WORKDIR", "ARG", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: ``RUN``, ``COPY``, ...
        text: what follows it, in one line.
    """

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words: of a list in brackets, or as a shell has them."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def read_dockerfile(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile, comments left out and lines that end in a backslash joined.

    Raises:
        UserError: an instruction that this does not know.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, text = line.partition(" ")
        if name not in NAMES:
            raise UserError(f"{path}: {name} is not an instruction that is known here: {', '.join(NAMES)}")
        found.append(Instruction(name, text.strip()))
    return found


def last(instructions: list[Instruction], name: str) -> Instruction:
    """The last instruction of a name, which is the one that counts."""
    return [each for each in instructions if each.name == name][-1]


def health_command(instructions: list[Instruction]) -> list[str]:
    """Words of the health check."""
    return json.loads(last(instructions, "HEALTHCHECK").text.partition("CMD ")[2])


def variables(instructions: list[Instruction], given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What ENV and ARG set; ``given`` replaces values of ARG, as ``--build-arg`` does."""
    for each in instructions:
        if each.name in ("ENV", "ARG"):
            for word in each.words:
                name, _, value = word.partition("=")
                yield name, given.get(name, value) if each.name == "ARG" else value
