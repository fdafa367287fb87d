"""The page in a real Chromium: what a person does with it."""

import itertools
import os
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("playwright", reason="needs requirements-dev.txt")
from playwright.sync_api import Page, expect, sync_playwright

from opensora.diffusion import stages
from opensora.serving.jobs import CANCELLED, COMPLETED
from opensora.utils.video import read_image, save_image
from tests.helpers.serving import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
PICTURE = Path(__file__).parents[2] / "assets" / "demo" / "blue_square.png"
HALF = np.repeat(np.uint8([[[0] * 3] * 32 + [[255] * 3] * 32]), 64, 0)
PATIENCE = 300_000  # milliseconds
FIRST_PAINT = (
    "() => { const v = document.querySelector('.os-frame video'); return v && v.readyState > 2 && v.videoWidth }"
)


class Pace:
    """Steps take a tenth of a second, and within :meth:`held` the ninth does not end: a slow browser, too, sees what
    goes on in between."""

    HELD = 8

    def __init__(self) -> None:
        self.goes = threading.Event()
        self.goes.set()

    def solve(self, plain, solver, velocity, x, steps, on_step=None):
        count = itertools.count()

        def told(*step):
            time.sleep(0.1)
            if on_step is not None:
                on_step(*step)
            if next(count) == self.HELD:
                assert self.goes.wait(PATIENCE / 1000)

        return plain(solver, velocity, x, steps, told)

    @contextmanager
    def held(self):
        self.goes.clear()
        try:
            yield
        finally:
            self.goes.set()


@pytest.fixture(scope="module", autouse=True)
def pace():
    pace = Pace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "solve", partial(pace.solve, stages.solve))
        yield pace


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser, demo_server):
    """A person's browser; it asks no other machine for anything, and nothing goes wrong in it."""
    _, address = demo_server
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    asked, wrong = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    yield context
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert wrong == []


@pytest.fixture(scope="module")
def page(context):
    page = context.new_page()
    open_page(page)
    return page


def open_page(page: Page) -> None:
    page.goto("/")
    expect(page.locator("#make")).to_be_visible()
    expect(page.locator(".os-title")).to_be_visible()  # loaded, not only drawn


def status(page: Page, *, of: str):
    return page.locator(f"#stage [data-status={of}]")


def ask(page: Page, prompt: str, steps: int) -> None:
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#make").click()


def own_jobs(service):
    return [job for job in service.store.page(50) if job.owner]


def test_a_prompt_becomes_a_video_that_plays_and_is_kept(page, demo_server, pace):
    service, _ = demo_server
    with pace.held():
        ask(page, "a red circle moving right", 12)
        expect(page.locator("#stage .os-bar")).to_be_visible()
        page.wait_for_selector("#stage .os-frame img[src*=preview]")
    status(page, of="completed").wait_for()
    assert page.wait_for_function(FIRST_PAINT).json_value() == 64
    page.wait_for_function("() => document.querySelector('.os-frame video').currentTime > 0.1")
    card = page.locator(".os-card").first
    expect(card).to_contain_text("a red circle moving right")
    job = own_jobs(service)[0]
    assert job.request["prompt"] == "a red circle moving right"
    assert job.facts["num_inference_steps"] == 12
    for link, start in ((0, b"ftyp"), (1, b"id")):
        with page.expect_download() as download:
            page.locator("#stage .os-gets a").nth(link).click()
        assert start in Path(download.value.path()).read_bytes()[:16]


def test_settings_of_a_video_come_back_and_it_is_deleted(page, demo_server):
    service, _ = demo_server
    ask(page, "a green <b>triangle</b>", 3)
    expect(page.locator("#stage .os-prompt")).to_have_text("a green <b>triangle</b>")  # as it was written
    expect(page.locator(".os-card", has_text="triangle")).to_be_visible()
    ask(page, "another", 2)
    expect(page.locator(".os-card", has_text="another")).to_be_visible()
    page.locator(".os-card", has_text="triangle").locator(".again").click()
    expect(page.locator("#prompt textarea")).to_have_value("a green <b>triangle</b>")
    expect(page.locator("#steps input[type=number]")).to_have_value("3")
    (made,) = (job for job in own_jobs(service) if "triangle" in job.request["prompt"])
    page.get_by_text("More settings").click()
    expect(page.locator("#seed input, #seed textarea")).to_have_value(str(made.facts["seed"]))
    page.locator("#seed input, #seed textarea").fill("")
    page.locator(".os-card", has_text="another").locator(".delete").click()
    expect(page.locator(".os-card", has_text="another")).to_have_count(0)
    assert not [job for job in own_jobs(service) if job.request["prompt"] == "another"]


def test_a_picture_is_the_first_frame(page, demo_server):
    service, _ = demo_server
    page.get_by_text("Start from a picture").click()
    page.locator("#first input[type=file]").set_input_files(PICTURE)
    expect(page.locator("#first img")).to_be_visible()
    ask(page, "a blue square moving up", 3)
    expect(page.locator(".os-card", has_text="blue square")).to_be_visible()
    job = own_jobs(service)[0]
    assert job.facts["cond_type"] == "i2v_head"
    assert (service.folders.of(job.id) / "first").stat().st_size > 100
    page.get_by_label("Remove Image").first.click()


def test_pictures_at_places_and_a_kept_part(page, demo_server, tmp_path):
    service, _ = demo_server
    page.get_by_text("Frames anywhere, clips, parts of a picture").click()
    page.locator("#references input[type=file]").set_input_files([PICTURE, PICTURE])
    expect(page.locator("#references .file-preview tr")).to_have_count(2)
    page.locator("#places input, #places textarea").fill("0;3")
    ask(page, "a blue square at places", 3)
    expect(page.get_by_text("references[1]@3: this autoencoder codes 4 frames together")).to_be_visible()
    page.locator("#places input, #places textarea").fill("0;-1")
    page.locator("#make").click()
    page.locator(".os-card", has_text="at places").wait_for()
    job = own_jobs(service)[0]
    assert (job.facts["cond_type"], job.request["uploads"]) == ("frames", ["reference_0", "reference_1"])
    page.locator(".os-card", has_text="at places").locator(".again").click()
    expect(page.locator("#references .file-preview tr")).to_have_count(2)
    page.locator("#references").get_by_role("button", name="Clear").click()
    page.locator("#places input, #places textarea").fill("")
    page.locator("#references input[type=file]").set_input_files([PICTURE])
    page.locator("#mask input[type=file]").set_input_files(save_image(HALF, tmp_path / "mask.png"))
    expect(page.locator("#mask img")).to_be_visible()
    ask(page, "a part of a square", 3)
    page.locator(".os-card", has_text="a part of").wait_for()
    job = own_jobs(service)[0]
    assert job.facts["cond_type"] == "region"
    assert read_image(service.folders.of(job.id) / "mask").tolist() == HALF.tolist()
    open_page(page)  # with an empty form


def test_one_is_stopped(page, demo_server, pace):
    service, _ = demo_server
    with pace.held():
        ask(page, "a circle to stop", 100)
        status(page, of="in_progress").wait_for()
        page.locator("#cancel").click()
        status(page, of="cancelled").wait_for()
    job = own_jobs(service)[0]
    assert job.status == CANCELLED
    assert job.step < 100
    expect(page.locator("#cancel")).to_be_disabled()


def test_a_reload_in_the_middle_finds_the_job(page, demo_server, pace):
    service, _ = demo_server
    queued = []
    with pace.held():
        ask(page, "a circle to come back to", 12)
        status(page, of="in_progress").wait_for()
        page.on("request", lambda request: queued.append(request.url) if "/queue/" in request.url else None)
        open_page(page)
        expect(page.locator("#stage .os-prompt")).to_have_text("a circle to come back to")
    status(page, of="completed").wait_for()
    assert queued == []  # what comes by itself must not be in the way of what a person asks for meanwhile
    until(lambda: own_jobs(service)[0].status == COMPLETED)


def test_what_cannot_be_made_is_said_and_the_page_goes_on(page):
    ask(page, "   ", 3)
    expect(page.get_by_text("prompt is empty")).to_be_visible()
    ask(page, "a circle after all", 2)
    expect(page.locator(".os-card", has_text="after all")).to_be_visible()


def test_another_language_and_another_browser(page, browser, demo_server):
    page.get_by_text("中文").click()
    expect(page.locator("#make")).to_have_text("生成视频")
    open_page(page)
    expect(page.locator("#make")).to_have_text("生成视频")
    chinese = browser.new_context(base_url=demo_server[1], locale="zh-CN")
    other = chinese.new_page()
    open_page(other)
    expect(other.locator("#make")).to_have_text("生成视频")
    expect(other.locator(".os-card")).to_have_count(0)  # others' videos are not one's own
    chinese.close()
