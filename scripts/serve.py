"""Serve a config: a page in the browser, and the videos API of OpenAI (docs/serving.md).

    python scripts/serve.py CONFIG [--port 8000] [--key value ...]

``--help`` lists every key.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opensora.config import run_main
from opensora.serving.command import main

if __name__ == "__main__":
    run_main(main)
