"""Captions by a vision-language model: behind an OpenAI-compatible endpoint, or a local one."""

import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
from PIL import Image

from opensora.config.options import Options, opt
from opensora.utils.chat import FIRST_SHARE, Answer, ChatClient, content_of, data_url
from opensora.utils.errors import UserError, first_line, shorten
from opensora.utils.hub import is_repo, local_model, only_local
from opensora.utils.logging import get_logger
from opensora.utils.media.pictures import read_picture
from opensora.utils.optional import OPENAI_HINT, check_module
from opensora.utils.waiting import no_slow_hub, within
from tools.data.engine.stage import LARGEST_SIDE, SMALLEST_SIDE, Row, Stage, Worker, shrink

logger = get_logger(__name__)

SEEN = "These pictures are frames of one short video, in order. "
STYLE = "Write plain sentences about what is to be seen, no introduction, no markup, no guesses about sound or intent."
TEMPLATES = {
    "short": SEEN + "Describe the video in one sentence of at most 25 words. " + STYLE,
    "long": SEEN
    + "Describe the video in 60 to 120 words: the main subject and its looks, what it does from beginning to "
    "end, the surroundings, the light and the style. " + STYLE,
    "motion": SEEN
    + "The camera motion was measured as: {camera_motion}. Describe the video in 60 to 120 words: first what "
    "moves and how it moves from beginning to end, then the camera, then subject, surroundings and light. " + STYLE,
}
OPENINGS = re.compile(
    r"^(?:sure[,!.]?\s*|certainly[,!.]?\s*|here(?: is|'s) (?:a|the) (?:description|caption)[^:.]*[:.]\s*"
    r"|(?:caption|description)\s*:\s*"
    r"|(?:in )?(?:the|this) (?:video|clip|footage|image|picture|scene|sequence)(?: clip)?"
    r"(?: (?:shows|depicts|features|captures|presents|displays|begins with|opens with)|,)\s+)",
    re.IGNORECASE,
)
Ask = Callable[[str, Sequence[Image.Image]], Answer]
"""``ask(prompt, pictures)`` gives the answer, and the tokens read and written."""


def clean_caption(text: str) -> str:
    """An answer as one line of plain text: no markup, quotes around it, links, or openings like 'The video shows'."""
    text = re.sub(r"```\w*|[*#`]{1,3}(?=\S)|(?<=\S)[*`]{1,3}|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://\S+|www\.\S+", "", text)
    text = re.sub(r"(?m)^\s*(?:[-•]|\d+[.)])\s+", "", text)
    text = " ".join(text.split()).strip("\"'“” ")
    while (opening := OPENINGS.match(text)) and opening.end() < len(text):
        text = text[opening.end() :]
    return text[:1].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(Options):
    """Captions by a vision-language model."""

    base_url: str | None = opt(None, "OpenAI-compatible endpoint (none: OPENAI_BASE_URL, or OpenAI's)", neutral=True)
    model: str = opt("gpt-4o", "its model there")
    local: str | None = opt(None, "folder or hub name of a transformers vision-language model, instead of an endpoint")
    template: str = opt("long", "short, long, motion, or your own text; {columns} of the table are filled in")
    frames: int = opt(3, "frames shown at most", least=1, most=1000)
    side: int = opt(512, "their long side", "px", least=SMALLEST_SIDE, most=LARGEST_SIDE)
    max_tokens: int = opt(300, "length of an answer", least=1, most=100_000)
    temperature: float = opt(0.01, "of sampling", least=0, most=100)
    clean: bool = opt(True, "strip markup and openings like 'The video shows'")
    concurrency: int = opt(8, "requests at a time", least=1, most=1000, neutral=True)
    attempts: int = opt(4, "tries before a row fails", least=1, most=1000, neutral=True)
    timeout: float = opt(60.0, "for an answer", "s", above=0, most=1e5, neutral=True)
    price_in: float = opt(0.0, "for the cost count", "per million input tokens", least=0, most=1e6, neutral=True)
    price_out: float = opt(0.0, "for the cost count", "per million output tokens", least=0, most=1e6, neutral=True)
    device: str = opt("cpu", "of a local model", neutral=True)


class Caption(Stage):
    """``text`` of a clip. The tokens are counted, so that the cost is known."""

    settings: CaptionOptions

    name = "caption"
    adds: ClassVar = {"text": pl.String, "tokens_in": pl.Int64, "tokens_out": pl.Int64}

    @property
    def concurrency(self) -> int:
        """An endpoint is waited for; a local model computes."""
        return 0 if self.settings.local else self.settings.concurrency

    @property
    def device(self) -> str:
        """Of a local model."""
        return self.settings.device if self.settings.local else "cpu"

    def prompt(self) -> str:
        """Template with its {columns}."""
        return TEMPLATES.get(self.settings.template, self.settings.template)

    def fields(self) -> tuple[str, ...]:
        """Columns that the template names."""
        return tuple(dict.fromkeys(n for _, n, _, _ in string.Formatter().parse(self.prompt()) if n is not None))

    @property
    def reads(self) -> tuple[str, ...]:
        """Frames, and what the template names."""
        return ("clip_id", "frame_paths", *self.fields())

    def weights(self) -> Sequence[Path]:
        """The folder of a local model; one of a hub is known by its name alone."""
        local = self.settings.local
        return [Path(local)] if local and not is_repo(local) else []

    def most_workers(self) -> int | None:
        """A local model is large: one at a time."""
        return 1

    def check(self) -> None:
        """The template can be filled in, and a local model is there."""
        try:
            empty = "" in self.fields()
        except ValueError as error:
            raise UserError(f"caption.template: {error}; write braces that are no column as {{{{ and }}}}") from error
        if empty:
            raise UserError("caption.template: {} names no column; write braces that are no column as {{ and }}")
        template = self.settings.template
        if template not in TEMPLATES and " " not in template:
            raise UserError(f"caption.template {template!r} is none of {', '.join(TEMPLATES)}, nor a prompt")
        local = self.settings.local
        if local and not is_repo(local) and not (Path(local) / "config.json").is_file():
            raise UserError(
                f"--caption.local {local}: no model there (config.json is missing); e.g. hf download "
                "Qwen/Qwen2.5-VL-7B-Instruct --local-dir ckpts/Qwen2.5-VL-7B-Instruct"
            )
        if not local:
            check_module("openai", "stage 'caption'", OPENAI_HINT)
            endpoint_of(self.settings, os.environ)

    def worker(self) -> Worker:
        """Caption one clip."""
        local, device, max_tokens = self.settings.local, self.settings.device, self.settings.max_tokens
        ask = LocalModel(local, device, max_tokens) if local else Endpoint(self.settings, os.environ)

        def caption(row: Row) -> list[Row]:
            paths = row["frame_paths"]
            step = max(len(paths) / self.settings.frames, 1)
            chosen = [paths[int((i + 0.5) * step)] for i in range(min(self.settings.frames, len(paths)))]
            images = [Image.fromarray(shrink(read_picture(self.root / p), self.settings.side)) for p in chosen]
            answer, tokens_in, tokens_out = ask(self.prompt().format_map(row), images)
            text = clean_caption(answer) if self.settings.clean else answer.strip()
            if not text:
                raise UserError("the model gave no caption")
            return [{"text": text, "tokens_in": tokens_in, "tokens_out": tokens_out}]

        return caption

    def finish(self, table: pl.DataFrame) -> pl.DataFrame:
        """Say what it took."""
        read, written = int(table["tokens_in"].sum()), int(table["tokens_out"].sum())
        cost = (read * self.settings.price_in + written * self.settings.price_out) / 1e6
        price = f", cost {cost:.2f}" if cost else ""
        logger.info("caption: %d texts, %d tokens read, %d written%s", table["tokens_in"].count(), read, written, price)
        return table


def endpoint_of(settings: CaptionOptions, environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """URL and key of the endpoint, None where OpenAI's own or none is meant.

    Raises:
        UserError: neither is given, so there is no model to ask, or what is given is no address.
    """
    url = settings.base_url or environment.get("OPENAI_BASE_URL")
    key = environment.get("OPENAI_API_KEY")
    if not key and not url:
        raise UserError(
            "stage 'caption' needs a vision-language model: set OPENAI_API_KEY, or give --caption.base_url URL of "
            "a server (vLLM, llama.cpp, ...), or --caption.local FOLDER of a model"
        )
    if url and not url.startswith(("http://", "https://")):
        raise UserError(f"--caption.base_url {url}: expected http://HOST:PORT/v1 or https://...")
    return url, key


class Endpoint:
    """Any server that speaks OpenAI's chat protocol and takes pictures.

    Args:
        settings: section ``caption``.
        environment: ``OPENAI_API_KEY`` and ``OPENAI_BASE_URL`` stand in for what is not set.

    Raises:
        UserError: no key for OpenAI's own, or nobody answers.
    """

    def __init__(self, settings: CaptionOptions, environment: Mapping[str, str]) -> None:
        import openai

        url, key = endpoint_of(settings, environment)
        self.settings = settings
        self.chat = ChatClient(url, key or "", settings.model, settings.timeout, settings.attempts)
        address = self.chat.client.base_url
        try:
            within(settings.timeout * FIRST_SHARE, self.chat.client.models.list)
        except (openai.APIConnectionError, TimeoutError) as error:
            raise UserError(
                f"caption endpoint {address}: {first_line(error).rstrip('.')}. Is the server running and "
                "--caption.base_url right? What was done before stays done: run again when it answers"
            ) from error
        except openai.AuthenticationError as error:
            raise UserError(f"caption endpoint {address} refuses OPENAI_API_KEY: {first_line(error)}") from error
        except openai.OpenAIError:
            pass  # it answers; not every server lists its models

    def __call__(self, prompt: str, images: Sequence[Image.Image]) -> Answer:
        """Ask."""
        content = content_of(prompt, [data_url(image, quality=90) for image in images])
        options = {"max_tokens": self.settings.max_tokens, "temperature": self.settings.temperature}
        return self.chat.ask([{"role": "user", "content": content}], **options)


class LocalModel:
    """A Hugging Face image-text-to-text model; takes the most likely words.

    Args:
        path: its folder, or a hub name.
        device: where it computes.
        max_tokens: length of an answer.

    Raises:
        UserError: the folder holds no such model.
    """

    def __init__(self, path: str, device: str, max_tokens: int) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.max_tokens = max_tokens
        path = local_model(path)
        local = only_local(path)
        try:
            with no_slow_hub(not local):
                self.processor = AutoProcessor.from_pretrained(path, local_files_only=local)
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    path, dtype="auto", local_files_only=local, output_loading_info=True
                )
        except Exception as error:  # of many kinds, by what is wrong with the files
            raise UserError(f"--caption.local {path}: cannot be loaded ({first_line(error)})") from error
        model, info = loaded
        if info["missing_keys"]:
            lacking = shorten(sorted(info["missing_keys"]))
            raise UserError(f"--caption.local {path}: its weights lack {lacking}; another model, or half of one")
        self.model = model.to(device).eval()

    def __call__(self, prompt: str, images: Sequence[Image.Image]) -> Answer:
        """Ask."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        read = inputs["input_ids"].shape[1]
        written = out[0, read:]
        return Answer(self.processor.decode(written, skip_special_tokens=True), int(read), len(written))
