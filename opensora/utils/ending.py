"""What a program that is told to end, by Ctrl-C or SIGTERM, does nevertheless."""

from collections.abc import Callable


def surely(clean: Callable[[], object]) -> None:
    """Call what removes leftovers; where the end is told meanwhile, once more before it goes on.

    Args:
        clean: may be called again wherever it was in the first call.
    """
    try:
        clean()
    except KeyboardInterrupt:
        clean()
        raise
