"""Jobs as HTML for the page. Whatever a client wrote is escaped."""

import time
from html import escape
from typing import Any

from opensora.serving.jobs import CANCELLED, COMPLETED, IN_PROGRESS, QUEUED, Job
from opensora.serving.service import Service
from opensora.serving.words import say


def stage(service: Service, job: Job | None, language: str) -> str:
    """The large view: what is being made, or was made last."""
    if job is None:
        return _stage(_idle(say("empty", language)), "")
    parts = {QUEUED: _queued, IN_PROGRESS: _running, COMPLETED: _completed}.get(job.status, _ended)
    return parts(service, job, language)


def _stage(frame: str, foot: str) -> str:
    below = f'<div class="os-foot">{foot}</div>' if foot else ""
    return f'<div class="os-stage"><div class="os-frame">{frame}</div>{below}</div>'


def _idle(text: str) -> str:
    return f'<div class="os-idle"><div class="reel"></div>{escape(text)}</div>'


def _line(title: str, right: str = "") -> str:
    return f'<div class="os-line"><b>{escape(title)}</b><span>{escape(right)}</span></div>'


def _prompt(job: Job) -> str:
    return f'<div class="os-prompt">{escape(job.request["prompt"])}</div>'


def _queued(service: Service, job: Job, language: str) -> str:
    place = service.store.place(job)
    waits = say("before", language, count=place) if place else say("next", language)
    loading = service.supervisor is not None and service.supervisor.state != "ready"
    title = say("starting" if loading else "queued", language)
    bar = '<div class="os-bar waits" role="progressbar"><i></i></div>'
    return _stage(_idle(title), f'<div data-status="queued">{_line(title, waits)}</div>{bar}{_prompt(job)}')


def _running(service: Service, job: Job, language: str) -> str:
    seen = service.folders.of(job.id) / "preview.webp"
    shown = f'<img alt="" src="/v1/videos/{job.id}/preview?step={job.step}">' if seen.exists() else ""
    spent = say("seconds", language, count=round(time.time() - (job.started or time.time())))
    done = job.steps and job.step >= job.steps
    where = say("decoding", language) if done else say("step", language, step=job.step, steps=job.steps)
    bar = (
        f'<div class="os-bar" role="progressbar" aria-valuenow="{job.progress}"><i style="width:{job.progress}%"></i>'
        "</div>"
    )
    line = _line(say("in_progress", language), f"{where} · {spent}")
    return _stage(shown or _idle(where), f'<div data-status="in_progress">{line}</div>{bar}{_prompt(job)}')


def _completed(service: Service, job: Job, language: str) -> str:
    spent = say("seconds", language, count=round(sum(job.seconds.values()), 1))
    line = _line(say("completed", language), spent)
    foot = (
        f'<div data-status="completed">{line}</div>{_prompt(job)}{chips(job, language)}{gets(service, job, language)}'
    )
    return _stage(media(service, job, "controls autoplay loop muted playsinline"), foot)


def _ended(service: Service, job: Job, language: str) -> str:
    title = say("cancelled" if job.status == CANCELLED else "failed", language)
    wrong = "" if job.status == CANCELLED else _wrong(job)
    return _stage(_idle(title), f'<div data-status="{job.status}">{_line(title)}</div>{wrong}{_prompt(job)}')


def _wrong(job: Job) -> str:
    return f'<div class="os-wrong">{escape((job.error or {}).get("message", ""))}</div>'


def media(service: Service, job: Job, how: str) -> str:
    """A result as an element that plays it."""
    content = f"/v1/videos/{job.id}/content"
    path = service.folders.result(job.id)
    if path is not None and path.suffix == ".png":
        return f'<img alt="" src="{content}">'
    return f'<video {how} poster="{content}?variant=thumbnail" src="{content}"></video>'


def chips(job: Job, language: str) -> str:
    """Settings of a job, in short."""
    facts: dict[str, Any] = job.facts
    texts = [
        f"{facts['width']} × {facts['height']}",
        say("frames", language, count=facts["num_frames"]),
        f"{say('steps', language)} {facts['num_inference_steps']}",
        f"{say('guidance', language)} {facts['guidance_scale']:g}",
        f"{say('seed', language)} {facts['seed']}",
        *([f"LoRA {job.request['lora']}"] if "lora" in job.request else []),
    ]
    return f'<div class="os-chips">{"".join(f"<span>{escape(text)}</span>" for text in texts)}</div>'


def gets(service: Service, job: Job, language: str) -> str:
    """Links to a result and to what reproduces it."""
    path, base = service.folders.result(job.id), f"/v1/videos/{job.id}"
    ending = path.suffix if path is not None else ".mp4"
    return (
        f'<div class="os-gets"><a href="{base}/content" download="{job.id}{ending}">↓ {ending[1:]}</a>'
        f'<a href="{base}/settings" download="{job.id}.json">↓ json</a></div>'
    )


def card(service: Service, job: Job, language: str) -> str:
    """The small view of a finished job, in the gallery."""
    if job.status == COMPLETED:
        shot, more = media(service, job, 'controls loop muted playsinline preload="none"'), gets(service, job, language)
    else:
        title = say("cancelled" if job.status == CANCELLED else "failed", language)
        shot, more = f'<div class="os-idle">{escape(title)}</div>', "" if job.status == CANCELLED else _wrong(job)
    about = f"{_prompt(job)}{chips(job, language)}{more}"
    return f'<div class="os-shot">{shot}</div><div class="os-about">{about}</div>'
