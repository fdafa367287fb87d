"""The page: a form, what is being made, and what one has made. It is a client of the same jobs as programs are.

A browser is known by a cookie that it gets with the page; jobs that it asks for are its own, also after a reload.
"""

import re
import secrets
from collections.abc import Mapping
from html import escape
from http.cookies import SimpleCookie
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora.serving import views
from opensora.serving.desk import FIRST, LAST, MASK, OTHERS
from opensora.serving.form import Form
from opensora.serving.jobs import Job
from opensora.serving.looks import CSS, theme
from opensora.serving.request import FILES, MOST_SEVERAL, SEVERAL, numbered
from opensora.serving.service import MIB, Service
from opensora.serving.words import LANGUAGES, preferred, say
from opensora.utils.errors import UserError

OWNER, LANGUAGE = "opensora_owner", "opensora_language"  # cookies
A_YEAR = 365 * 24 * 3600
SAID: Mapping[str, Any] = MappingProxyType(dict(show_progress="hidden", api_visibility="private"))
# Most events are answered by the request that brings them. In Gradio's queue answers come by one stream for all events,
# which the server closes once none is open: an event that comes before the browser has heard of that is never answered,
# and events that nobody asked for (ticks, the page being loaded) come at any time. What can be refused stays in the
# queue, since that is the way by which messages come.
QUIET: Mapping[str, Any] = MappingProxyType({**SAID, "queue": False})
TICK = 0.6  # seconds between looks at a job that is being made
CARDS = 12
KEEP_LANGUAGE = f"(l) => {{ document.cookie = '{LANGUAGE}=' + l + '; path=/; max-age={A_YEAR}; samesite=strict'; }}"
ELSEWHERE = re.compile(rb'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>')  # pictures for previews of links
POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'; "
POLICY += "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; font-src 'self' data:; "
POLICY += "frame-ancestors 'self'; base-uri 'self'"


def mount_page(app: FastAPI, service: Service) -> None:
    """Add the page to an application, at its root."""
    page = Page(service)
    blocks = page.build()
    for block in blocks.blocks.values():  # Gradio would fetch addresses that come in the place of uploads
        block.async_move_resource_to_block_cache = _only_uploads(block)  # type: ignore[method-assign]
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=service.cfg.host,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=int(service.cfg.max_upload * MIB),
        theme=theme(),
        css=CSS,
    )
    app.add_middleware(PageHeaders)


def _only_uploads(block: Any) -> Any:
    move = block.async_move_resource_to_block_cache

    async def moved(place: Any) -> Any:
        if str(place).startswith(("http:", "https:")):
            raise gr.Error("addresses are not fetched here")
        return await move(place)

    return moved


class PageHeaders:
    """Gives a browser the cookie by which its jobs are known, and its orders to load nothing from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        known = OWNER in SimpleCookie(Headers(scope=scope).get("cookie", ""))
        start: Message = {}
        body = b""

        async def sent(message: Message) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                content = ELSEWHERE.sub(b"", body)
                _set_headers(MutableHeaders(raw=start["headers"]), known, len(content))
                await send(start)
                await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, sent)


def _set_headers(headers: MutableHeaders, known: bool, length: int) -> None:
    headers["content-length"] = str(length)
    headers["content-security-policy"] = POLICY
    headers["referrer-policy"] = "no-referrer"
    headers["cache-control"] = "no-store"
    if not known:
        token = secrets.token_hex(16)
        headers.append("set-cookie", f"{OWNER}={token}; Path=/; Max-Age={A_YEAR}; HttpOnly; SameSite=Strict")


def owner_of(request: gr.Request) -> str:
    """The browser that asks.

    Raises:
        gr.Error: it keeps no cookies.
    """
    owner = request.cookies.get(OWNER, "")
    if not (len(owner) == 32 and owner.isalnum()):
        raise gr.Error("this page needs its cookie: reload it, and allow cookies")
    return f"browser-{owner}"


class Page(Form):
    """Builds the page of a service, whose jobs it shows.

    Args:
        service: see :class:`opensora.serving.form.Form`.
    """

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="opensora", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
            self.language = gr.State("en")
            self.job, self.shown = gr.State(""), gr.State("")  # a job's name; what the stage shows
            self.kept = gr.State("")  # what the gallery shows
            self.drawn = gr.Textbox(visible="hidden")  # the same; states tell the browser nothing, so this does
            with gr.Row(equal_height=True):
                self.head = gr.HTML(self._head("en"), padding=False)
                self.switch = gr.Radio(
                    [(name, code) for code, name in LANGUAGES.items()], value="en", show_label=False,
                    container=False, elem_id="language",
                )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=5, min_width=380):
                    self.build_form()
                with gr.Column(scale=6, min_width=420):
                    self.stage = gr.HTML(views.stage(self.service, None, "en"), elem_id="stage", padding=False)
            self.title = gr.HTML("", padding=False)
            self._gallery()
            self.timer = gr.Timer(TICK, active=False)
            self._events(blocks)
        return blocks

    def _head(self, language: str) -> str:
        return (
            '<div class="os-head"><div class="mark"></div>'
            f"<div><h1>opensora <code>{escape(self.desk.model_name)}</code></h1>"
            f"<p>{say('tagline', language)}</p></div></div>"
        )

    # ---------------------------------------------------------------------------------------------------------- gallery

    def _gallery(self) -> None:
        @gr.render([self.kept, self.language], [self.drawn.change], show_progress="hidden", queue=False)
        def cards(kept: str, language: str) -> None:
            jobs = [job for id in kept.split() if (job := self.service.store.get(id)) is not None]
            with gr.Row(elem_classes="os-cards"):
                for job in jobs:
                    self._card(job, language)

    def _card(self, job: Job, language: str) -> None:
        name = gr.State(job.id)
        with gr.Column(elem_classes="os-card"):
            gr.HTML(views.card(self.service, job, language), padding=False)
            with gr.Row(elem_classes="os-do"):
                again = gr.Button(say("again", language), size="sm", elem_classes="again", min_width=70, scale=3)
                delete = gr.Button(say("delete", language), size="sm", elem_classes="delete", min_width=70)
        again.click(
            self.again, [name], [*self.fields.values(), self.first, self.last], **QUIET,
        )  # fmt: skip
        delete.click(
            self.delete, [name, self.language], [self.kept, self.drawn, self.title], **QUIET,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- events

    def _events(self, blocks: gr.Blocks) -> None:
        view = [self.job, self.shown, self.stage, self.timer, self.cancel, self.kept, self.drawn, self.title]
        said = [component for component, _ in self.named]
        blocks.load(self.open, None, [self.language, self.switch, *view], **QUIET).then(
            self.translate, [self.switch], [self.language, self.head, *said], **QUIET
        )
        self.switch.input(self.translate, [self.switch], [self.language, self.head, *said], **QUIET).then(
            self.look, [self.job, gr.State(""), self.language], view, **QUIET
        )
        self.switch.input(None, [self.switch], None, js=KEEP_LANGUAGE, **QUIET)
        ask = [self.language, self.first, self.last, *self.fields.values()]
        gr.on([self.make.click, self.prompt.submit], self.ask, ask, view, **SAID)
        self.timer.tick(self.look, [self.job, self.shown, self.language], view, trigger_mode="once", **QUIET)
        self.cancel.click(self.stop, [self.job, self.language], view, **QUIET)

    def open(self, request: gr.Request) -> list[Any]:
        """The page is loaded: the language, and the job that is under way, or was last."""
        language = request.cookies.get(LANGUAGE) or preferred(request.headers.get("accept-language"))
        language = language if language in LANGUAGES else "en"
        jobs = self.service.store.page(CARDS, owner=owner_of(request))
        job = next((job for job in reversed(jobs) if job.is_open), jobs[0] if jobs else None)
        return [language, language, *self._view(job, language, owner_of(request))]

    def translate(self, language: str) -> list[Any]:
        """The page in another language."""
        updates: list[Any] = []
        for _, words in self.named:
            said: dict[str, Any] = {name: say(word, language, fps=self.cfg.fps_save) for name, word in words.items()}
            updates.append(gr.update(**said))
        return [language, self._head(language), *updates]

    def ask(self, request: gr.Request, language: str, first: str | None, last: str | None, *values: Any) -> list[Any]:
        """Send the form.

        Raises:
            gr.Error: it cannot be made; says why.
        """
        fields = self.fields_of(dict(zip(self.fields, values, strict=True)))
        several = fields.pop(SEVERAL, [])
        if len(several) > MOST_SEVERAL:
            raise gr.Error(f"{SEVERAL}: {len(several)} are given; at most {MOST_SEVERAL} are taken")
        paths = dict(zip(FILES, (first, last, fields.pop("mask", None))))
        paths |= {numbered(number): path for number, path in enumerate(several)}
        files = {name: Path(path).read_bytes() for name, path in paths.items() if path}
        try:
            job = self.service.create(fields, files, owner_of(request))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return self._view(job, language, owner_of(request))

    def look(self, id: str, shown: str, language: str, request: gr.Request) -> list[Any]:
        """How far a job is."""
        owner = owner_of(request)
        return self._view(self._own(id, owner), language, owner, shown)

    def stop(self, id: str, language: str, request: gr.Request) -> list[Any]:
        """Cancel a job of one's own."""
        owner = owner_of(request)
        if self._own(id, owner) is not None:
            self.service.cancel(id)
        return self._view(self._own(id, owner), language, owner)

    def again(self, id: str, request: gr.Request) -> list[Any]:
        """The form with the settings of a job."""
        job = self._own(id, owner_of(request))
        if job is None:
            return [gr.skip()] * (len(self.fields) + 2)
        asked = {
            "resolution": self.resolutions()[0],
            "aspect_ratio": self.ratios()[0],
            "negative_prompt": "",
            "motion_score": "",
            "lora": "",
            "lora_strength": 1.0,
            "refine_prompt": self.cfg.refine_prompt,
            "places": "",
            "cond_type": "",
            **{name: job.facts.get(name) for name in ("num_frames", "num_inference_steps", "guidance_scale", "seed")},
            **job.request,
        }
        folder, uploads = self.service.folders.of(id), job.request.get("uploads", ())
        pictures = [str(folder / name) if name in uploads else None for name in (FIRST, LAST)]
        asked["mask"] = str(folder / MASK) if MASK in uploads else None
        asked[SEVERAL] = [str(folder / name) for name in OTHERS if name in uploads] or None
        asked["next_prompts"] = "\n".join(job.request.get("next_prompts", ()))
        asked["seed"] = str(asked["seed"])  # it has more digits than a browser's numbers
        return [*(asked.get(name) for name in self.fields), *pictures]

    def delete(self, id: str, language: str, request: gr.Request) -> list[Any]:
        """Delete a job of one's own."""
        owner = owner_of(request)
        if self._own(id, owner) is not None:
            self.service.remove(id)
        return self._kept(language, owner)

    def _own(self, id: str, owner: str) -> Job | None:
        job = self.service.store.get(id) if id else None
        return job if job is not None and job.owner == owner else None

    def _view(self, job: Job | None, language: str, owner: str, shown: str = "") -> list[Any]:
        """What the events of a job set: its name, the stage, the timer, the button, the gallery."""
        html = views.stage(self.service, job, language)
        is_open = job is not None and job.is_open
        stage = gr.skip() if html == shown else html  # a video that plays goes on
        timer, cancel = gr.Timer(active=is_open), gr.Button(interactive=is_open)
        return [job.id if job else "", html, stage, timer, cancel, *self._kept(language, owner)]

    def _kept(self, language: str, owner: str) -> list[Any]:
        """Names of one's finished jobs, newest first, and the gallery's title."""
        jobs = [job for job in self.service.store.page(CARDS + 4, owner=owner) if not job.is_open][:CARDS]
        note = "" if jobs else f'<p class="os-note">{say("mine_empty", language)}</p>'
        kept = " ".join(job.id for job in jobs)
        return [kept, f"{language} {kept}", f'<h2 class="os-title">{say("mine", language)}</h2>{note}']
