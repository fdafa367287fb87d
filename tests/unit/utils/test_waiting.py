"""Servers that send a byte now and then hold nobody up."""

import itertools
import time

import pytest

from opensora.utils import hub, waiting
from opensora.utils.chat import ChatClient
from opensora.utils.errors import UserError
from tests.helpers.dripping import dripping as dripping_server


@pytest.fixture
def dripping(monkeypatch):
    """Address of a server that drips, see :mod:`tests.helpers.dripping`."""
    for name in ("HEAD_SECONDS", "SLOW_SECONDS"):
        monkeypatch.setattr(waiting, name, 0.2)
    with dripping_server() as address:
        yield address


def test_within():
    assert waiting.within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        waiting.within(5, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds"):
        waiting.within(0.01, lambda: time.sleep(0.2))


def test_a_body_that_comes_fast_enough(monkeypatch):
    now = itertools.count(step=30.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert len([*waiting.in_time(iter([bytes(30_000)] * 9))]) == 9
    with pytest.raises(UserError, match="too slowly: 29999 bytes in 30 s"):
        [*waiting.in_time(iter([bytes(29_999)]))]


@pytest.mark.parametrize(("inside", "said"), [("model.bin", "sends too slowly"), ("head.bin", "no answer within")])
def test_a_download_from_the_hub(dripping, tmp_path, monkeypatch, inside, said):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", dripping)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dripping + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    assert file_download
    with pytest.raises(UserError, match=said):
        hub.download("org/name", inside, True, str(tmp_path))


def test_a_hub_that_was_given_up_is_not_asked_again(dripping):
    from huggingface_hub import get_session

    with waiting.no_slow_hub():
        for path in ("head/a", "head/b", "b"):
            began = time.monotonic()
            with pytest.raises(UserError, match="no answer within"):
                get_session().get(f"{dripping}/{path}")
    assert time.monotonic() - began < 0.1


def test_is_the_hub_there(dripping, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"{dripping}/head")
    monkeypatch.setattr(hub, "TRY_SECONDS", 0.1)
    head = hub.is_reachable()
    assert head in (True, False), "it answers, in time"


@pytest.mark.parametrize("path", ["head", "body"])
def test_a_language_model(dripping, path):
    pytest.importorskip("openai")
    began = time.monotonic()
    with pytest.raises((TimeoutError, OSError)):
        ChatClient(f"{dripping}/{path}", "", "m", timeout=0.3, attempts=1).ask([{"role": "user", "content": "a"}])
    assert time.monotonic() - began < 3
