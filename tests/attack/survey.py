"""Runs every case whose name a pattern matches, and prints what does not hold: ``python -m tests.attack.survey fuzz``.

The test takes a part of them, to be quick.
"""

import re
import sys
import tempfile
import time
from pathlib import Path

from tests.attack.cases import all_cases
from tests.attack.inputs import run_commands, write_inputs
from tests.attack.runner import Server, attack


def main(pattern: str = "") -> None:
    """Run, print."""
    with tempfile.TemporaryDirectory() as folder:
        good, server = Path(folder) / "good", Server()
        good.mkdir()
        write_inputs(good)
        run_commands(good, server)
        started, bad, count = time.monotonic(), 0, 0
        for case in all_cases():
            if re.search(pattern, case.name):
                result = attack(server, case, good, Path(folder) / "place")
                bad, count = bad + bool(result.problems), count + 1
                if result.problems:
                    print(f"{case.name}: {result.problems}\n    {result.said.strip()[-400:]}", flush=True)
        server.close()
    print(f"{count} cases, {bad} of them do not hold, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
