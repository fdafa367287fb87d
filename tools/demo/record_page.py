"""Film the page while it makes a video: starts a server with the demo model, and drives a real Chromium."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from opensora.utils.errors import UserError
from opensora.utils.optional import require

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a green triangle moving left on a light background", "a red circle moving right on a dark background")
WIDTH, HEIGHT, SHOWN_WIDTH = 1120, 860, 800
STEPS = 30
MOST_STEPS = 16  # pictures of a video in the making
PATIENCE = 300  # seconds until a page or a video is there
PLAYING = "() => { const v = document.querySelector('.os-frame video'); return v && v.readyState > 2 }"
SEEK = "time => { const v = document.querySelector('.os-frame video'); v.pause(); v.currentTime = time }"

Shot = tuple[Image.Image, int]  # what was seen, and for how many milliseconds it is to be shown


def film(config: Path) -> list[Shot]:
    """A prompt is typed, a video is made, the video plays.

    Raises:
        UserError: playwright or Chromium is missing.
    """
    api = require("playwright.sync_api", "filming the page", "`pip install -r requirements-dev.txt`")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise UserError("filming the page needs Chromium: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with _server(config) as address, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(base_url=address, viewport={"width": WIDTH, "height": HEIGHT}, locale="en-US")
        page.set_default_timeout(PATIENCE * 1000)
        page.goto("/")
        _make(page, PROMPTS[0], 20)
        _finished(page, PROMPTS[0])
        shots = [*_asked(page, PROMPTS[1], STEPS), *_some(list(_made(page))), *_played(page)]
        browser.close()
    return shots


@contextmanager
def _server(config: Path) -> Iterator[str]:
    """Within it, a server of a config answers at an address of this machine."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(config), "--port", str(port)]
        server = subprocess.Popen([*command, "--data-dir", folder], cwd=ROOT)
        try:
            _wait_for(f"{address}/health", server)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    """Return once an address answers."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                raise UserError(f"the server ended with status {server.returncode}") from None
            time.sleep(0.5)
    raise UserError(f"{url} did not answer within {PATIENCE} s")


def _make(page: Any, prompt: str, steps: int) -> None:
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#make").click()


def _finished(page: Any, prompt: str) -> None:
    """Wait for a video of a prompt that can be played."""
    page.locator("#stage [data-status=completed]").wait_for()
    page.locator(".os-card", has_text=prompt).first.wait_for()
    page.wait_for_function(PLAYING)


def _seen(page: Any) -> Image.Image:
    """The page from its top on."""
    page.evaluate("() => window.scrollTo(0, 0)")
    picture = Image.open(BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    return picture.resize((SHOWN_WIDTH, round(picture.height * SHOWN_WIDTH / picture.width)), Image.Resampling.LANCZOS)


def _asked(page: Any, prompt: str, steps: int) -> Iterator[Shot]:
    """The prompt is typed, a few words at a time, and the button pressed."""
    page.locator("#prompt textarea").fill("")
    words = prompt.split()
    for end in range(1, len(words) + 1, 2):
        page.locator("#prompt textarea").fill(" ".join(words[:end]))
        yield _seen(page), 200
    _make(page, prompt, steps)


def _made(page: Any) -> Iterator[Shot]:
    """Steps and previews, until the video is there."""
    done = page.locator(".os-card", has_text=PROMPTS[1])
    seen = page.locator("#stage [data-status=in_progress]").or_(done)
    seen.first.wait_for()  # on a fast machine the video may be there first
    while done.count() == 0:
        yield _seen(page), 250
        page.wait_for_timeout(400)


def _some(shots: list[Shot]) -> list[Shot]:
    """As many as are worth watching, evenly spaced, the last one among them: a busy machine takes its time."""
    count = min(MOST_STEPS, len(shots))
    return [shots[-1 - round(i * len(shots) / count)] for i in reversed(range(count))]


def _played(page: Any) -> Iterator[Shot]:
    """The finished video from its first to its last frame."""
    _finished(page, PROMPTS[1])
    for frame in range(17):
        page.evaluate(SEEK, (frame + 0.5) / 8)
        page.wait_for_timeout(150)
        yield _seen(page), 125 if frame < 16 else 1500
