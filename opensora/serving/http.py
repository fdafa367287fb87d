"""The videos API of OpenAI over HTTP, with what it lacks: cancelling, events, previews, metrics."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from opensora.serving import wire
from opensora.serving.desk import UnknownModel
from opensora.serving.folders import PREVIEW, SHEET, THUMBNAIL
from opensora.serving.guard import Guard
from opensora.serving.jobs import COMPLETED, Job, QueueFull
from opensora.serving.metrics import registry_of
from opensora.serving.reading import Broken, WrongType, read_body
from opensora.serving.request import BadField
from opensora.serving.service import MIB, NoRoom, Service
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

MOST_LISTED, LISTED = 100, 20
LOOK, BEAT = 0.2, 15.0  # seconds between looks at a job that is streamed, and between signs of life
VARIANTS = {"thumbnail": (THUMBNAIL, "image/webp"), "spritesheet": (SHEET, "image/jpeg")}
TYPES = {".mp4": "video/mp4", ".png": "image/png"}
CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 429: "try_again"}
KINDS = {
    QueueFull: (429, "queue_full"),
    NoRoom: (429, "no_room"),
    WrongType: (415, "wrong_content_type"),
    Broken: (400, "broken_body"),
    UnknownModel: (404, "model_not_found"),
}
ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
NOT_HERE = ("remix", "edits", "extensions", "characters")
OWN_HOSTS = ("localhost",)


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def create_app(service: Service) -> FastAPI:
    """The application of a service, which is to be running."""
    # no pages of documentation: theirs load scripts from elsewhere
    app = FastAPI(title="opensora", openapi_url=None, docs_url=None, redoc_url=None)
    cfg = service.cfg
    Api(service).mount(app)
    _handle_errors(app)
    if cfg.page:
        from opensora.serving.page import mount_page

        mount_page(app, service)
    app.add_middleware(
        Guard, key=cfg.api_key, hosts=(*OWN_HOSTS, cfg.host), most=int(cfg.max_upload * MIB) + MIB
    )  # and the rest of a form
    return app


def _handle_errors(app: FastAPI) -> None:
    """Answers to what is raised, in OpenAI's shape."""

    def answer(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
        headers = {"retry-after": "5"} if status == 429 else None
        return JSONResponse(wire.error(message, code, param), status, headers)

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> JSONResponse:
        return answer(error.status, str(error), error.code, error.param)

    @app.exception_handler(UserError)
    async def of_user(request: Request, error: UserError) -> JSONResponse:
        status, code = KINDS.get(type(error), (400, "invalid_value"))
        return answer(status, str(error), code, error.field if isinstance(error, BadField) else None)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), CODES.get(error.status_code, "bad_request"))

    @app.exception_handler(ClientDisconnect)
    async def of_nobody(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(400, "the client has gone", "broken_body")


class Api:
    """The routes of a service."""

    def __init__(self, service: Service) -> None:
        self.service, self.store = service, service.store
        self.registry, self.since = registry_of(service), int(time.time())

    def mount(self, app: FastAPI) -> None:
        """Add the routes to an application; what is unknown below ``/v1`` is answered here too."""
        for method, path, endpoint in (
            ("POST", "/v1/videos", self.create),
            ("GET", "/v1/videos", self.list),
            *(("POST", f"/v1/videos/{name}", self.not_here) for name in NOT_HERE[1:]),
            ("GET", "/v1/videos/{id}", self.retrieve),
            ("DELETE", "/v1/videos/{id}", self.delete),
            ("GET", "/v1/videos/{id}/content", self.content),
            ("GET", "/v1/videos/{id}/preview", self.preview),
            ("GET", "/v1/videos/{id}/settings", self.settings),
            ("GET", "/v1/videos/{id}/events", self.events),
            ("POST", "/v1/videos/{id}/cancel", self.cancel),
            ("POST", "/v1/videos/{id}/remix", self.not_here),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{id}", self.model),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
        ):
            app.router.routes.append(Route(path, endpoint, methods=[method]))
        app.router.routes.append(Route("/v1/{rest:path}", self.unknown, methods=ALL_METHODS))

    # ----------------------------------------------------------------------------------------------------------- videos

    async def create(self, request: Request) -> Response:
        """Take a request; the answer is its job, which waits."""
        fields, files = await read_body(request, int(2 * self.service.cfg.max_upload * MIB))
        job = await run_in_threadpool(self.service.create, fields, files)
        return self._video(job)

    async def list(self, request: Request) -> Response:
        """A page of jobs, newest first unless told otherwise."""
        query = request.query_params
        limit, order, after = query.get("limit", str(LISTED)), query.get("order", "desc"), query.get("after")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MOST_LISTED):
            raise ApiError(400, f"limit: a whole number from 1 to {MOST_LISTED}", "invalid_value", "limit")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: asc or desc", "invalid_value", "order")
        last = await run_in_threadpool(self.store.get, after) if after else None
        if after and last is None:
            raise ApiError(400, "after: no such video", "invalid_value", "after")
        jobs = await run_in_threadpool(self.store.page, int(limit) + 1, last, order == "desc")
        more = len(jobs) > int(limit)
        return JSONResponse(await run_in_threadpool(wire.page, self.service, jobs[: int(limit)], more))

    async def retrieve(self, request: Request) -> Response:
        """A job."""
        return self._video(await self._job(request))

    async def delete(self, request: Request) -> Response:
        """Delete a job with its files; one that is being made is stopped."""
        job = await self._job(request)
        await run_in_threadpool(self.service.remove, job.id)
        return JSONResponse(wire.deleted(job))

    async def cancel(self, request: Request) -> Response:
        """Stop a job."""
        job = await self._job(request)
        if not await run_in_threadpool(self.service.cancel, job.id):
            job = await self._job(request)
            raise ApiError(409, f"{job.id} is {job.status} already", "not_cancellable")
        return self._video(await self._job(request))

    async def content(self, request: Request) -> Response:
        """The video, or a picture of it; parts of it, too (``Range``)."""
        variant = request.query_params.get("variant", "video")
        if variant not in ("video", *VARIANTS):
            raise ApiError(400, f"variant: video, {', '.join(VARIANTS)}", "invalid_value", "variant")
        job = await self._completed(request)
        if variant != "video":
            name, kind = VARIANTS[variant]
            return self._file(self.service.folders.of(job.id) / name, kind, job.id)
        path = self.service.folders.result(job.id)
        return self._file(path or Path("gone"), TYPES[path.suffix] if path else "", job.id)

    async def settings(self, request: Request) -> Response:
        """All that reproduces a video, as JSON."""
        job = await self._completed(request)
        record = self.service.folders.stem(job.id).with_suffix(".json")
        content = json.dumps(wire.settings(job, record), indent=2, ensure_ascii=False)
        headers = {"content-disposition": f'inline; filename="{job.id}.json"'}
        return Response(content, media_type="application/json", headers=headers)

    async def preview(self, request: Request) -> Response:
        """The latents of a job that is being made, as a small picture that moves."""
        job = await self._job(request)
        path = self.service.folders.of(job.id) / PREVIEW
        try:
            content = await run_in_threadpool(path.read_bytes)  # it may go at any moment
        except OSError:
            raise ApiError(404, "no preview (yet, or any more)", "not_found") from None
        return Response(content, media_type="image/webp", headers={"cache-control": "no-store"})

    async def events(self, request: Request) -> Response:
        """Server-sent events: the job whenever it changes, until it is finished."""
        job = await self._job(request)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(job, request), media_type="text/event-stream", headers=headers)

    async def _events(self, job: Job | None, request: Request) -> AsyncIterator[str]:
        said, heard = "", time.monotonic()
        id = job.id if job else ""
        while job is not None and not await request.is_disconnected():
            now = json.dumps(await run_in_threadpool(wire.video, self.service, job), ensure_ascii=False)
            if now != said:
                yield f"event: {'progress' if job.is_open else job.status}\ndata: {now}\n\n"
                said, heard = now, time.monotonic()
            elif time.monotonic() - heard > BEAT:
                yield ": still there\n\n"
                heard = time.monotonic()
            if not job.is_open:
                return
            await asyncio.sleep(LOOK)
            job = await run_in_threadpool(self.store.get, id)
        if job is None:
            yield f"event: deleted\ndata: {json.dumps({'id': id})}\n\n"

    async def not_here(self, request: Request) -> Response:
        """Parts of OpenAI's API that make a video of another one."""
        raise ApiError(400, f"{request.url.path} is not supported; create a video instead", "not_supported")

    # ------------------------------------------------------------------------------------------------------------ other

    async def models(self, request: Request) -> Response:
        """The one model, in a list."""
        return JSONResponse({"object": "list", "data": [wire.model(self.service, self.since)]})

    async def model(self, request: Request) -> Response:
        """The model of a name."""
        if request.path_params["id"] != self.service.desk.model_name:
            raise ApiError(404, "no such model", "model_not_found", "model")
        return JSONResponse(wire.model(self.service, self.since))

    async def health(self, request: Request) -> Response:
        """Whether jobs are made: 503 where the worker does not come up."""
        supervisor = self.service.supervisor
        state = supervisor.state if supervisor is not None else "elsewhere"
        counts = await run_in_threadpool(self.store.counts)
        body = {"status": "failing" if state == "failing" else "ok", "worker": state, "jobs": counts}
        return JSONResponse(body, 503 if state == "failing" else 200)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        text = await run_in_threadpool(generate_latest, self.registry)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    async def unknown(self, request: Request) -> Response:
        """What is no route, or one for other methods."""
        for route in request.app.router.routes:
            known = isinstance(route, Route) and route.path_regex.match(request.url.path)
            if known and route.path != "/v1/{rest:path}":
                raise ApiError(405, f"{request.method} is not for {request.url.path}", "method_not_allowed")
        raise ApiError(404, "no such address", "not_found")

    # ---------------------------------------------------------------------------------------------------------- helpers

    async def _job(self, request: Request) -> Job:
        job = await run_in_threadpool(self.store.get, request.path_params["id"])
        if job is None:
            raise ApiError(404, "no such video; results expire", "video_not_found")
        return job

    async def _completed(self, request: Request) -> Job:
        job = await self._job(request)
        if job.is_open:
            raise ApiError(400, f"the video is not ready: {job.status}, {job.progress} %", "video_not_ready")
        if job.status != COMPLETED:
            raise ApiError(400, f"there is no video: {(job.error or {}).get('message', job.status)}", "video_failed")
        return job

    def _video(self, job: Job) -> Response:
        headers = {"openai-poll-after-ms": str(wire.POLL_MS)} if job.is_open else None
        return JSONResponse(wire.video(self.service, job), headers=headers)

    def _file(self, path: Path, kind: str, id: str) -> Response:
        if not path.is_file():
            raise ApiError(404, "the file has gone", "not_found")
        return FileResponse(path, media_type=kind, filename=f"{id}{path.suffix}", content_disposition_type="inline")
