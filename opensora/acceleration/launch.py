"""torchrun whose errors are those of the program: ``python -m opensora.acceleration.launch [OPTIONS] SCRIPT ...``.

Options are torchrun's. Where torchrun wraps what a process said in a report of its own and ends with status 1, this
adds nothing to it and ends with the status of the first process that failed.
"""

import logging
import signal
import sys

# announces every process that fails, which has said itself why, and those that are then ended
REPORTING = "torch.distributed.elastic.multiprocessing.api"
SAID_ALREADY = ("failed (exitcode", "Sending process")


def main(argv: list[str] | None = None) -> None:
    """Start the processes and wait for their end.

    Raises:
        SystemExit: one of them failed; its status, or 128 and the number of the signal that ended it.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(sys.argv[1:] if argv is None else argv)
    logging.getLogger(REPORTING).addFilter(lambda record: not record.getMessage().startswith(SAID_ALREADY))
    try:
        run.run(options)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        print(f"error: process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        raise SystemExit(128 - failure.exitcode) from None


if __name__ == "__main__":
    main()  # a --debug is the program's
