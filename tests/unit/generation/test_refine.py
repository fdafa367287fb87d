"""The language model that writes prompts out: a server on this machine, and its failures."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from opensora.config import load_config
from opensora.config.commands import InferenceOptions
from opensora.generation.refine import INSTRUCTIONS, ApiModel, make_asker, refine_requests, wants_language_model
from opensora.generation.requests import Request, read_requests
from opensora.utils.errors import UserError
from opensora.utils.video import save_image

SETTINGS = InferenceOptions(refine_prompt=True)


def request(**changes) -> Request:
    base = {
        "text": "a cat",
        "index": 0,
        "where": "--prompt",
        "name": None,
        "ref": "",
        "refs": (),
        "cond_type": "t2v",
        "neg": "",
    }
    return Request(**{**base, "fps": 24.0, "motion_score": None, "seed": None, **changes})


@pytest.fixture
def server():
    """An endpoint that keeps what it was asked; ``replies`` are its answers (a number is an error status)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.asked.append((self.path, self.headers.get("Authorization"), body))
            reply = httpd.replies.pop(0)
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            if not isinstance(reply, int):
                self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

        def log_message(self, *arguments):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.replies = [], []
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def model(server, **settings) -> ApiModel:
    return ApiModel(f"http://127.0.0.1:{server.server_port}/v1", "secret", "some-model", pause=0.01, **settings)


def test_prompt_is_written_out(server):
    server.replies = ["A grey cat\nwalks over grass."]
    (refined,) = refine_requests([request()], SETTINGS, model(server))
    assert refined.text == "a cat"
    assert refined.final_text == "A grey cat walks over grass. 24 FPS."
    path, key, body = server.asked[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "some-model")
    assert body["messages"][0]["content"] == INSTRUCTIONS["t2v"]
    assert body["max_tokens"] == 250


def test_picture_is_sent_along(server, tmp_path):
    path = save_image(np.zeros((900, 600, 3), np.uint8), tmp_path / "a.png")
    server.replies = ["It moves."]
    refine_requests([request(refs=(str(path),), cond_type="i2v_head")], SETTINGS, model(server))
    text, picture = server.asked[0][2]["messages"][1]["content"]
    assert text["text"] == "a cat"
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert server.asked[0][2]["messages"][0]["content"] == INSTRUCTIONS["i2v"]


def test_picture_first_has_its_own_text(server):
    server.replies = ["The motion.", "The picture."]
    (refined,) = refine_requests([request(cond_type="i2v_head")], replace(SETTINGS, use_t2i2v=True), model(server))
    assert (refined.refined, refined.image_text) == ("The motion.", "The picture.")


@pytest.mark.parametrize(
    ("reply", "score"), [("7", "7"), ("6 motion score", "6"), ("99", "15"), ("lots", "4"), (404, "4")]
)
def test_dynamic_motion_score(server, reply, score):
    server.replies = [reply]
    (refined,) = refine_requests(
        [request(motion_score="dynamic")], replace(SETTINGS, refine_prompt=False), model(server)
    )
    assert refined.final_text == f"a cat. 24 FPS. {score} motion score."


def test_a_busy_server_is_asked_again(server):
    server.replies = [503, 500, "Better."]
    assert refine_requests([request()], SETTINGS, model(server))[0].refined == "Better."


@pytest.mark.parametrize(("replies", "asked"), [([503] * 3, 3), ([401], 1), ([""], 1)])
def test_failure_leaves_the_prompt(server, replies, asked):
    server.replies = list(replies)
    (kept,) = refine_requests([request()], SETTINGS, model(server))
    assert kept.final_text == "a cat. 24 FPS."
    assert len(server.asked) == asked


def test_silence_leaves_the_prompt():
    nobody = ApiModel("http://127.0.0.1:9/v1", "", "m", timeout=0.2, attempts=2, pause=0.01)
    assert refine_requests([request()], SETTINGS, nobody)[0].refined is None


def test_settings(tmp_path):
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        make_asker(SETTINGS, {})
    with pytest.raises(UserError, match=r"config\.json is missing"):
        make_asker(replace(SETTINGS, refine_model=str(tmp_path)), {})
    api = make_asker(replace(SETTINGS, refine_api_model="mine"), {"OPENAI_API_KEY": "k", "OPENAI_MODEL": "other"})()
    assert (api.url, api.key, api.model) == ("https://api.openai.com/v1/chat/completions", "k", "mine")
    keyless = make_asker(replace(SETTINGS, refine_base_url="http://localhost:8000/v1/"), {})()
    assert keyless.url == "http://localhost:8000/v1/chat/completions"
    assert wants_language_model(SETTINGS, [])
    assert not wants_language_model(replace(SETTINGS, refine_prompt=False), [request()])


def test_local_model(tiny_config, tmp_path):
    from transformers import CLIPTokenizer, LlamaConfig, LlamaForCausalLM

    CLIPTokenizer.from_pretrained(tiny_config["clip"]["from_pretrained"]).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=2000, **sizes)).save_pretrained(tmp_path)
    answer = make_asker(replace(SETTINGS, refine_model=str(tmp_path)), {})()("Answer.", "a cat", None, 4)
    assert isinstance(answer, str)


def test_texts_that_a_table_has_written_out(tiny_config, tmp_path):
    """They are used as they are, and no language model is asked for them."""
    (tmp_path / "t.csv").write_text("text,refined,image_text\nalley,a long alley at night,an alley\nbarn,,\n")
    section = {"type": "text", "data_path": str(tmp_path / "t.csv")}
    cfg = load_config({**tiny_config, "dataset": section, "refine_prompt": True}, InferenceOptions)
    asked = []
    written = refine_requests(read_requests(cfg, tmp_path), cfg, lambda *words: asked.append(words[1]) or "answer")
    assert asked == ["barn"]
    assert [request.final_text for request in written] == ["a long alley at night. 8 FPS.", "answer. 8 FPS."]
    assert [request.picture_text for request in written] == ["an alley", "barn"]
    assert written[0].text == "alley"
