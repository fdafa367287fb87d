"""Jobs in the shapes of OpenAI's videos API, and what a sample's record tells clients."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.serving.jobs import COMPLETED, QUEUED, Job
from opensora.serving.service import Service

POLL_MS = 500  # what clients that poll are told to wait
OF_WEIGHTS = ("sha256", "strength", "quantize", "approximate")
RECORD = (
    *("text", "prompt", "negative_prompt", "cond_type", "seed", "fps", "frames", "latent", "tokens", "forwards"),
    *("step_cache", "attention", "seconds", "versions"),
)


def video(service: Service, job: Job) -> dict[str, Any]:
    """A job as a ``video`` object: OpenAI's fields first, then those that say more."""
    facts, expires = job.facts, service.expires(job)
    return {
        "id": job.id,
        "object": "video",
        "model": service.desk.model_name,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created),
        "completed_at": int(job.finished) if job.status == COMPLETED and job.finished else None,
        "expires_at": int(expires) if expires else None,
        "size": f"{facts['width']}x{facts['height']}",
        "seconds": f"{facts['num_frames'] / facts['fps']:g}",
        "prompt": job.request["prompt"],
        "remixed_from_video_id": None,
        "error": job.error,
        **{name: facts[name] for name in sorted(facts.keys() - {"text", "forwards"})},
        **{name: job.request[name] for name in OPTIONAL if name in job.request},
        "step": job.step,
        "steps": job.steps,
        "queue_position": service.store.place(job) if job.status == QUEUED else None,
        "started_at": int(job.started) if job.started else None,
        "timings": job.seconds,
    }


OPTIONAL = ("negative_prompt", "next_prompts", "motion_score", "refine_prompt", "lora", "lora_strength", "flow_shift",
            "solver", "image_guidance_scale", "places")  # fmt: skip


def deleted(job: Job) -> dict[str, Any]:
    """The answer to a deletion."""
    return {"id": job.id, "object": "video.deleted", "deleted": True}


def page(service: Service, jobs: list[Job], has_more: bool) -> dict[str, Any]:
    """A page of a list."""
    ids = [job.id for job in jobs]
    return {
        "object": "list",
        "data": [video(service, job) for job in jobs],
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }


def model(service: Service, created: int) -> dict[str, Any]:
    """The one model."""
    return {"id": service.desk.model_name, "object": "model", "created": created, "owned_by": "opensora"}


def error(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def settings(job: Job, record: Path) -> dict[str, Any]:
    """All that reproduces a result, without the places where the server keeps things."""
    content = json.loads(record.read_text(encoding="utf-8"))
    weights: Mapping[str, Any] = content.get("weights", {})
    return {
        "id": job.id,
        "request": {name: value for name, value in job.request.items() if name != "uploads"},
        **{name: content[name] for name in RECORD if name in content},
        "weights": {
            name: {key: value for key, value in entry.items() if key in OF_WEIGHTS} for name, entry in weights.items()
        },
    }
