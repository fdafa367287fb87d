"""The chat client, on a server of this machine and its failures."""

import importlib.util
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from opensora.utils.chat import Answer, ChatClient, content_of, data_url
from opensora.utils.errors import UserError

ANSWER = {"choices": [{"message": {"content": "Yes."}}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@pytest.fixture
def server():
    """Answers with ``replies`` in turn: a status, a text, or None for one that drips."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            httpd.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = httpd.replies.pop(0)
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if isinstance(reply, str):
                self.wfile.write(reply.encode())
            while reply is None and not httpd.over.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()

        def log_message(self, *arguments):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.replies, httpd.over = [], [], threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.over.set()
    httpd.shutdown()
    httpd.server_close()


def client(server, **settings):
    return ChatClient(f"http://127.0.0.1:{server.server_port}/v1", "", "m", pause=0.01, **settings)


def test_an_answer_and_its_tokens(server):
    server.replies = [json.dumps(ANSWER)]
    url = data_url(np.zeros((40, 80, 3), np.uint8), 20)
    messages = [{"role": "user", "content": content_of("What?", [url])}]
    assert client(server).ask(messages, max_tokens=5) == Answer("Yes.", 7, 2)
    (asked,) = server.asked
    assert (asked["model"], asked["max_tokens"], asked["messages"]) == ("m", 5, messages)


@pytest.mark.parametrize(("status", "times"), [(400, 1), (404, 1), (429, 2), (500, 2), (503, 2)])
def test_what_may_succeed_later_is_asked_again(server, status, times):
    server.replies = [status, json.dumps(ANSWER)]
    if times == 1:
        with pytest.raises(Exception, match=str(status)):
            client(server).ask([])
    else:
        assert client(server).ask([]).text == "Yes."
    assert len(server.asked) == times


@pytest.mark.parametrize("reply", ["{}", "[]", "no json", '{"choices": []}', '{"choices": [3]}'])
def test_what_is_no_answer(server, reply):
    server.replies = [reply] * 2
    with pytest.raises(ValueError):
        client(server, attempts=2).ask([])
    assert len(server.asked) == 2


def test_a_server_that_drips_does_not_hold_the_program(server):
    server.replies = [None]
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"in 0\.[23]\d* seconds"):
        client(server, timeout=0.4, attempts=1).ask([])
    assert time.monotonic() - begun < 60  # it drips for ever


def test_a_server_that_has_never_answered_is_given_up(server):
    server.replies = [None, json.dumps(ANSWER)]
    silent = client(server, timeout=0.4, attempts=3)
    for _ in range(2):  # however many questions
        with pytest.raises(TimeoutError):
            silent.ask([])
    assert len(server.asked) <= 1


def test_a_server_that_has_answered_is_asked_again(server):
    server.replies = [json.dumps(ANSWER), None, json.dumps(ANSWER)]
    known = client(server, attempts=2)
    known.ask([])
    known.timeout = 0.3
    assert known.ask([]).text == "Yes."


def test_pictures_are_shrunk_never_changed():
    image = Image.new("RGB", (100, 50))
    data_url(image, 10)
    assert image.size == (100, 50)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install openai"):
        ChatClient(None, "key", "m")
