"""What the page sends and shows, without a browser (that is tests/ui)."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="needs requirements-serve.txt")
import gradio as gr
import numpy as np
from fastapi import FastAPI
from gradio import processing_utils

from opensora.serving.jobs import CANCELLED, QUEUED
from opensora.serving.page import Page, mount_page, owner_of
from opensora.serving.views import stage
from opensora.serving.words import LANGUAGES, WORDS, preferred
from opensora.utils.video import save_image
from tests.conftest import tiny_inference_config
from tests.helpers.serving import served

FIRST, SECOND = (SimpleNamespace(cookies={"opensora_owner": letter * 32}, headers={}) for letter in "ab")
PICTURE = str(Path(__file__).parents[3] / "assets" / "demo" / "blue_square.png")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return served(tiny_inference_config(), tmp_path_factory.mktemp("page"), window=9)


@pytest.fixture
def page(service):
    page = Page(service)
    page.build()
    yield page
    for id in service.store.ids():
        service.remove(id)


def form(page, **values):
    """The form as it is when the page opens, with some of it filled in."""
    return [values.get(name, component.value) for name, component in page.fields.items()]


def test_a_form_as_it_is_asks_for_what_the_config_says(page, service):
    page.ask(FIRST, "en", None, None, *form(page, prompt="a"))
    (job,) = service.store.page(9)
    option = service.cfg.sampling_option
    assert job.status == QUEUED
    assert (job.facts["num_frames"], job.facts["num_inference_steps"]) == (option.num_frames, option.num_steps)
    assert (job.facts["width"], job.facts["height"]) == (32, 32)
    assert job.request.keys() == {"prompt", "num_frames", "num_inference_steps", "guidance_scale"}


def test_settings_come_back_as_they_were_sent(page, service):
    sent = dict(prompt="a", num_frames=13, num_inference_steps=7, negative_prompt="b", seed="9007199254740993")
    sent |= dict(motion_score="7", aspect_ratio="16:9", guidance_scale=2.5)
    page.ask(FIRST, "en", None, None, *form(page, **sent))
    (job,) = service.store.page(9)
    back = dict(zip(page.fields, page.again(job.id, FIRST)))
    assert {name: back[name] for name in sent} == sent
    page.ask(FIRST, "en", None, None, *(back[name] for name in page.fields))
    assert service.store.page(1)[0].facts == job.facts


def test_references_mask_and_prompts_of_windows_go_there_and_back(page, service):
    white = np.repeat(np.uint8([[[0] * 3] * 32 + [[255] * 3] * 32]), 64, 0)
    mask = save_image(white, service.folders.root / "mask.png")
    common = {"prompt": "a", "num_frames": 9}
    sent = [
        {**common, "num_frames": 13, "references": [PICTURE] * 3, "places": "0;4;-1", "cond_type": "frames"},
        {**common, "references": [PICTURE], "mask": str(mask)},
        {**common, "num_frames": 17, "next_prompts": "b\nc, d"},
    ]
    for values, cond_type in zip(sent, ("frames", "region", "t2v")):
        page.ask(FIRST, "en", None, None, *form(page, **values))
        job = service.store.page(1)[0]
        assert job.facts["cond_type"] == cond_type
        back = dict(zip(page.fields, page.again(job.id, FIRST)))
        files = {"references", "mask"} & values.keys()
        assert {name: back[name] for name in values.keys() - files} == {
            name: values[name] for name in values.keys() - files
        }
        assert len(back["references"] or ()) == len(values.get("references", ()))
        page.ask(FIRST, "en", None, None, *(back[name] for name in page.fields))
        assert service.store.page(1)[0].request == {**job.request, "seed": job.facts["seed"]}
    with pytest.raises(gr.Error, match="9 are given; at most 8"):
        page.ask(FIRST, "en", None, None, *form(page, prompt="a", references=[PICTURE] * 9))


def test_nobody_touches_others_jobs(page, service):
    page.ask(FIRST, "en", None, None, *form(page, prompt="a"))
    (job,) = service.store.page(9)
    page.stop(job.id, "en", SECOND)
    page.delete(job.id, "en", SECOND)
    assert service.store[job.id].status == QUEUED
    assert "prompt" not in str(page.look(job.id, "", "en", SECOND)[1])
    page.stop(job.id, "en", FIRST)
    assert service.store[job.id].status == CANCELLED
    page.delete(job.id, "en", FIRST)
    assert service.store.get(job.id) is None


def test_a_browser_without_its_cookie_is_told():
    for cookies in ({}, {"opensora_owner": "x"}, {"opensora_owner": "../" * 11}):
        with pytest.raises(gr.Error, match="cookie"):
            owner_of(SimpleNamespace(cookies=cookies))


def test_what_is_wrong_is_said(page):
    with pytest.raises(gr.Error, match="seed"):
        page.ask(FIRST, "en", None, None, *form(page, prompt="a", seed="x"))


def test_what_clients_wrote_is_escaped(page, service):
    page.ask(FIRST, "en", None, None, *form(page, prompt="<script>alert(1)</script>"))
    html = stage(service, service.store.page(1)[0], "en")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_all_is_said_in_both_languages(page):
    assert all(all(texts) and len(texts) == len(LANGUAGES) for texts in WORDS.values())
    for language in LANGUAGES:
        assert len(page.translate(language)) == len(page.named) + 2
    assert [preferred(accepted) for accepted in (None, "de", "zh-CN,zh;q=0.9")] == ["en", "en", "zh"]


def test_addresses_in_the_place_of_uploads_are_not_fetched(service, monkeypatch):
    pages = []
    monkeypatch.setattr("opensora.serving.page.Page.build", lambda self: pages.append(build(self)) or pages[0])
    mount_page(FastAPI(), service)
    payload = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    for block in pages[0].blocks.values():
        with pytest.raises(gr.Error, match="not fetched"):
            asyncio.run(processing_utils.async_move_files_to_cache(payload, block, check_in_upload_folder=True))


build = Page.build
