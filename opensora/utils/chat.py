"""A client of servers that speak OpenAI's chat protocol, with the package ``openai``, which is imported when used."""

import base64
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from opensora.utils.optional import OPENAI_HINT, check_module
from opensora.utils.waiting import within

AGAIN = (408, 409, 429)  # statuses of requests that may succeed later, besides those from 500
MOST_BYTES = 1 << 22  # of an answer
FIRST_SHARE = 0.75  # of the time of one answer, that all questions together have until a server has answered once


class Answer(NamedTuple):
    """What a model says, and the tokens read and written (0 where the server does not count)."""

    text: str
    tokens_in: int
    tokens_out: int


def data_url(picture: np.ndarray | Image.Image, side: int | None = None, quality: int = 75) -> str:
    """A picture as text for a request.

    Args:
        picture: uint8 [H, W, 3], or one of Pillow's.
        side: most pixels of its longer side; None keeps its size.
        quality: of the JPEG, up to 95.
    """
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if side is not None:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def content_of(text: str, pictures: Sequence[str]) -> str | list[dict[str, Any]]:
    """The content of a message: a text, with pictures (see :func:`data_url`) where there are some."""
    if not pictures:
        return text
    return [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in pictures)]


class ChatClient:
    """One model behind a chat endpoint.

    Args:
        base_url: address before ``/chat/completions``; None takes OpenAI's own.
        key: API key, empty if the server wants none.
        model: its name there.
        timeout: seconds until an answer must be there, to the last byte. A server that has never answered is given up
            after `FIRST_SHARE` of it, however often and however many questions are asked.
        attempts: how often to ask before giving up what may succeed later.
        pause: seconds before the second attempt; doubles for each further one.

    Attributes:
        has_answered: it has, once at least.

    Raises:
        UserError: the package ``openai`` is not installed.
    """

    def __init__(
        self, base_url: str | None, key: str, model: str, timeout: float = 60.0, attempts: int = 3, pause: float = 1.0
    ) -> None:
        check_module("openai", "a language model behind a server", OPENAI_HINT)
        import openai

        self.model, self.timeout, self.attempts, self.pause = model, timeout, attempts, pause
        self.client = openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=0, timeout=timeout)
        self.has_answered = False
        self._asked_first: float | None = None
        self._errors = (openai.APIError, OSError, ValueError)

    def ask(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """Ask.

        Args:
            messages: of the protocol: ``role`` and ``content``, see :func:`content_of`.
            options: of the protocol: ``max_tokens``, ``temperature``, ...

        Raises:
            openai.APIError, OSError, ValueError: all attempts failed; the last one's error.
        """
        for attempt in range(self.attempts):
            seconds = self._seconds_left()
            try:
                answer = _read_answer(within(seconds, partial(self._post, messages, options, seconds)))
                self.has_answered = True
                return answer
            except self._errors as error:
                status = getattr(error, "status_code", None)
                final = status is not None and status < 500 and status not in AGAIN
                pause = self.pause * 2**attempt
                if final or attempt == self.attempts - 1 or self._seconds_left() <= pause:
                    raise
                time.sleep(pause)
        raise AssertionError("at least one attempt is made")

    def _seconds_left(self) -> float:
        """For an attempt, or the pause before it."""
        if self.has_answered:
            return self.timeout
        if self._asked_first is None:
            self._asked_first = time.monotonic()
        return max(0.0, self._asked_first + FIRST_SHARE * self.timeout - time.monotonic())

    def _post(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        content = b""
        create: Any = self.client.chat.completions.with_streaming_response.create
        with create(model=self.model, messages=messages, **options) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > deadline:  # a server that sends a byte now and then is never idle
                    raise TimeoutError(f"no whole answer in {seconds:g} seconds")
                if len(content) > MOST_BYTES:
                    raise ValueError(f"an answer of more than {MOST_BYTES} bytes")
        return content


def _read_answer(content: bytes) -> Answer:
    """Raises ValueError for what is no answer of the protocol."""
    answer = json.loads(content)
    try:
        text, usage = str(answer["choices"][0]["message"]["content"] or ""), answer.get("usage") or {}
        return Answer(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"unexpected answer: {str(answer)[:200]}") from error
