"""A language model that writes prompts out and judges how much motion they hold.

Either any server that speaks the OpenAI chat protocol, or a local Hugging Face causal language model. What fails is
logged and falls back to the original prompt.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opensora.config.commands import InferenceOptions
from opensora.diffusion.references import media_of
from opensora.diffusion.wording import MOST_MOTION
from opensora.generation.requests import Request
from opensora.utils.chat import ChatClient, content_of, data_url
from opensora.utils.errors import UserError
from opensora.utils.hub import local_model, only_local
from opensora.utils.logging import get_logger
from opensora.utils.optional import OPENAI_HINT, check_module
from opensora.utils.progress import quiet_libraries
from opensora.utils.video import is_video, read_image, read_video
from opensora.utils.waiting import no_slow_hub

logger = get_logger(__name__)

Ask = Callable[[str, str, np.ndarray | None, int], str]
"""``ask(instructions, text, picture or None, most tokens)`` gives the model's answer."""

DEFAULT_URL, DEFAULT_MODEL = "https://api.openai.com/v1", "gpt-4o"
DEFAULT_MOTION = "4"
IMAGE_SIDE = 512  # pixels of a picture sent along
TEXT_TOKENS, MOTION_TOKENS = 250, 20

STYLE = (
    "Answer with the description alone, in English, as one paragraph of plain sentences of at most 120 words. Keep "
    "every subject, number, colour, action and quoted word that the user names, and add nothing that contradicts them."
)
INSTRUCTIONS = {
    "t2v": "You turn a short idea into a description that a video model can film in a few seconds. Say what is seen, "
    "how it looks, how it moves from first to last frame, what is around it, the light, and what the camera does. "
    + STYLE,
    "t2i": "You turn a short idea into a description of one still picture. Say what is seen, its looks and "
    "arrangement, what is around it, the light and the style. Describe no motion. " + STYLE,
    "i2v": "A video model continues the given picture, which is the first frame. From the user's idea, and the picture "
    "if you see one, describe how the things in it move and change and what the camera does, without describing "
    "things that are not there. " + STYLE,
}
MOTION_INSTRUCTIONS = (
    "You judge how much motion a video of the user's text should show, as a whole number from 1 (a still scene) over 4 "
    "(ordinary motion, such as walking) to 15 (violent motion everywhere). Answer with the number alone."
)


def wants_language_model(cfg: InferenceOptions, requests: Sequence[Request]) -> bool:
    """Whether anything of a run is to be asked of a language model."""
    return bool(cfg.refine_prompt) or any(request.motion_score == "dynamic" for request in requests)


def make_asker(cfg: InferenceOptions, environment: Mapping[str, str]) -> Callable[[], Ask]:
    """Check the settings of the language model, and say how to start it.

    Args:
        cfg: resolved config; ``refine_model`` names a local model, ``refine_base_url`` and ``refine_api_model`` one
            behind a server.
        environment: ``OPENAI_API_KEY``, ``OPENAI_BASE_URL`` and ``OPENAI_MODEL`` stand in for what is not set.

    Returns:
        A function that gives the model, to be called when it is needed.

    Raises:
        UserError: no local model there, or no API key for a server that needs one.
    """
    local = cfg.refine_model
    if local:
        if local.startswith((".", "/", "~")) and not (Path(local).expanduser() / "config.json").is_file():
            raise UserError(f"--refine-model {local}: no Hugging Face model folder there (config.json is missing)")
        return lambda: LocalModel(local)
    url = cfg.refine_base_url or environment.get("OPENAI_BASE_URL")
    key = environment.get("OPENAI_API_KEY", "")
    if not key and not url:
        raise UserError(
            "refine_prompt and motion_score=dynamic need a language model: set OPENAI_API_KEY, or give "
            "--refine-base-url URL of a server without key, or --refine-model PATH of a local model"
        )
    check_module("openai", "a language model behind a server", OPENAI_HINT)
    name = cfg.refine_api_model or environment.get("OPENAI_MODEL") or DEFAULT_MODEL
    return lambda: ApiModel(url or DEFAULT_URL, key, name)


class ApiModel:
    """A model behind an OpenAI-compatible chat endpoint.

    Args:
        base_url: address before ``/chat/completions``.
        key: API key, empty if the server wants none.
        model: its name there.
        settings: further ones of :class:`opensora.utils.chat.ChatClient`.
    """

    def __init__(self, base_url: str, key: str, model: str, **settings: Any) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.key, self.model = key, model
        self.client = ChatClient(base_url, key, model, **settings)

    def __call__(self, instructions: str, text: str, picture: np.ndarray | None, max_tokens: int) -> str:
        """Ask; raises what :meth:`ChatClient.ask` does when all attempts failed."""
        pictures = [] if picture is None else [data_url(picture, IMAGE_SIDE)]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": content_of(text, pictures)},
        ]
        return self.client.ask(messages, temperature=0.01, top_p=0.7, max_tokens=max_tokens).text


class LocalModel:
    """A Hugging Face causal language model on the CPU or the GPU of the machine; it sees no pictures."""

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = local_model(path)
        local = only_local(path)
        try:
            with quiet_libraries(), no_slow_hub(not local):
                self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=local)
            self.model = model.to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"--refine-model {path}: cannot be loaded ({error})") from error

    def __call__(self, instructions: str, text: str, picture: np.ndarray | None, max_tokens: int) -> str:
        """Ask, taking the most likely words."""
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": text}]
        if self.tokenizer.chat_template:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = f"{instructions}\n\nUser: {text}\nAnswer:"
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return str(self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def refine_requests(requests: Sequence[Request], cfg: InferenceOptions, ask: Ask) -> list[Request]:
    """Requests with their prompts expanded (``refine_prompt``) and motion scores filled in (``dynamic``).

    Each prompt is refined once, however many videos it has; texts already refined in the table stay.
    """
    return [_refine_one(request, cfg, ask) for request in requests]


def _refine_one(request: Request, cfg: InferenceOptions, ask: Ask) -> Request:
    changes: dict[str, Any] = {}
    if cfg.refine_prompt:
        kind = "t2v" if request.cond_type == "t2v" else "i2v"
        if request.refined is None:
            changes["refined"] = _try(ask, INSTRUCTIONS[kind], request, _first_picture(request), TEXT_TOKENS)
        if cfg.use_t2i2v and not request.refs and request.image_text is None:
            changes["image_text"] = _try(ask, INSTRUCTIONS["t2i"], request, None, TEXT_TOKENS)
    if request.motion_score == "dynamic":
        answer = _try(ask, MOTION_INSTRUCTIONS, request, None, MOTION_TOKENS) or ""
        found = re.search(r"\d+", answer)
        if not found:
            logger.warning("%s: no motion score in %r, taking %s", request.where, answer, DEFAULT_MOTION)
        changes["motion_score"] = str(min(max(int(found[0]), 1), MOST_MOTION)) if found else DEFAULT_MOTION
    return dataclasses.replace(request, **changes)


def _try(ask: Ask, instructions: str, request: Request, picture: np.ndarray | None, max_tokens: int) -> str | None:
    """The answer as one line of text, None (with a warning) where there is none."""
    try:
        answer = " ".join(ask(instructions, request.text, picture, max_tokens).split())
    except Exception as error:  # whatever a server or a model may do, the video is made
        logger.warning("%s: the language model failed (%s: %s)", request.where, type(error).__name__, error)
        return None
    if not answer:
        logger.warning("%s: the language model gave no answer", request.where)
    return answer or None


def _first_picture(request: Request) -> np.ndarray | None:
    if not request.refs:
        return None
    path = str(media_of(request.refs[0]))
    return read_video(path, max_frames=1)[0][0] if is_video(path) else read_image(path)
