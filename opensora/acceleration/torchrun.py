"""What torchrun says of this process, read in one place."""

from collections.abc import Mapping
from dataclasses import dataclass

from opensora.utils.errors import UserError

MOST_PORT = 65_535
MEETING = ("MASTER_ADDR", "MASTER_PORT", "RANK")  # what processes need to find one another


@dataclass(frozen=True)
class Torchrun:
    """Place of this process among those that torchrun started; a single one without it.

    Attributes:
        rank: of this process, from 0 to ``world_size - 1``.
        local_rank: its number on its machine.
        world_size: number of processes.
        attempt: how often torchrun has started them anew.
        address, port: where they meet; none where there is only this one.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    attempt: int = 0
    address: str = ""
    port: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Torchrun":
        """What the variables of torchrun say.

        Raises:
            UserError: one of them is no number, or a rank or port that cannot be.
        """

        def number(name: str, default: int = 0) -> int:
            text = environment.get(name) or str(default)
            if not (text.isascii() and text.isdigit()):
                raise UserError(f"environment variable {name}={text!r}: expected a whole number, as torchrun sets it")
            return int(text)

        found = cls(
            number("RANK"),
            number("LOCAL_RANK"),
            number("WORLD_SIZE", 1),
            number("TORCHELASTIC_RESTART_COUNT"),
            environment.get("MASTER_ADDR", ""),
            number("MASTER_PORT"),
        )
        if found.rank >= found.world_size:
            raise UserError(
                f"environment variables RANK={found.rank} and WORLD_SIZE={found.world_size}: ranks are counted from 0"
            )
        if found.port > MOST_PORT:
            raise UserError(f"environment variable MASTER_PORT='{found.port}': expected at most {MOST_PORT}")
        return found

    @staticmethod
    def check_whole(environment: Mapping[str, str]) -> None:
        """Raise a UserError unless all is there by which several processes find one another."""
        missing = [name for name in MEETING if not environment.get(name)]
        if missing:
            raise UserError(
                f"environment variable {missing[0]} is not set, and WORLD_SIZE={environment.get('WORLD_SIZE')} says "
                "that there are several processes: start them with torchrun, or unset WORLD_SIZE"
            )
