"""What every door of a server does: take a request, look a job up, cancel it, delete it."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora.config.commands import ServeOptions
from opensora.serving.desk import FIRST, LAST, MASK, OTHERS, Desk
from opensora.serving.folders import Folders
from opensora.serving.jobs import Job, JobStore, QueueFull, new_id
from opensora.serving.request import FILES, MOST_SEVERAL, SEVERAL, BadField, GenerationRequest, numbered
from opensora.serving.supervisor import Supervisor
from opensora.serving.uploads import Fetcher, check_upload, read_data_url
from opensora.utils.download import is_url
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

MIB, GIB = 2**20, 2**30
SWEEP = 60.0  # seconds between looks for what has expired
LOOK = 5.0  # seconds for which a look at the disk is good
PLACES = {FILES[0]: FIRST, FILES[1]: LAST, FILES[2]: MASK}
PLACES |= {numbered(number): name for number, name in enumerate(OTHERS)}


class NoRoom(UserError):
    """Uploads and results fill the room that they have."""


class Service:
    """Jobs for clients.

    Args:
        cfg: of the server.
        desk: checks requests.
        store: the jobs.
        folders: where their files are.
        supervisor: of the worker; none where another process looks after that.
        fetch: gets references from addresses.
    """

    def __init__(
        self,
        cfg: ServeOptions,
        desk: Desk,
        store: JobStore,
        folders: Folders,
        supervisor: Supervisor | None = None,
        fetch: Fetcher | None = None,
    ) -> None:
        self.cfg, self.desk, self.store, self.folders, self.supervisor = cfg, desk, store, folders, supervisor
        self.fetch = fetch or Fetcher(int(cfg.max_upload * MIB))
        self._room: tuple[float, bool] = (0.0, True)
        self._stopping = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_always, name="sweeper", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, jobs are made; see :meth:`start` and :meth:`stop`."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def start(self) -> None:
        """Start the worker, and the deletion of what has expired."""
        self.folders.clean(self.store.ids())
        if self.supervisor is not None:
            self.supervisor.start()
        self._sweeper.start()

    def stop(self) -> None:
        """End both."""
        self._stopping.set()
        if self.supervisor is not None:
            self.supervisor.stop()
        self._sweeper.join()

    # ---------------------------------------------------------------------------------------------------------- create

    def create(self, fields: Mapping[str, Any], files: Mapping[str, bytes], owner: str = "") -> Job:
        """Take a request.

        Args:
            fields: of the request, by name.
            files: uploads by field: ``input_reference``, ``last_reference``, ``mask``, ``references[0]``, ...
            owner: of the job, see :class:`opensora.serving.jobs.Job`.

        Raises:
            BadField, UserError: it cannot be made.
            QueueFull, NoRoom: not now.
        """
        plain = {name: value for name, value in fields.items() if name not in (*FILES, SEVERAL)}
        asked = GenerationRequest.read(plain)
        self._check_room()
        contents = {field: check_upload(field, content) for field, content in self._contents(fields, files).items()}
        id = new_id()
        folder = self.folders.of(id)
        try:
            uploads = self._keep(folder, contents)
            prepared = self._prepare(asked, uploads)
            request = {**asked.as_json(), **({"uploads": sorted(uploads)} if uploads else {})}
            return self.store.add(
                *(id, owner, prepared.shape, request, prepared.facts, prepared.plan.num_steps, self.cfg.max_queue)
            )
        except BaseException:
            self.folders.remove(id)
            raise

    def _contents(self, fields: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
        found = dict(files)
        several = fields.get(SEVERAL) or []
        if not isinstance(several, list) or len(several) > MOST_SEVERAL:
            raise BadField(SEVERAL, f"{SEVERAL}: expected a list of at most {MOST_SEVERAL} pictures and clips")
        given = {**fields, **{numbered(number): value for number, value in enumerate(several)}}
        for field in PLACES:
            value = given.get(field)
            if value in (None, ""):
                continue
            if field in found:
                raise UserError(f"{field} is given twice")
            found[field] = self._from_text(field, _address_in(field, value))
        return found

    def _from_text(self, field: str, text: str) -> bytes:
        if text.startswith("data:"):
            return read_data_url(field, text)
        if not is_url(text):
            raise UserError(f"{field}: send a file, or a data: URL; paths of the server are not read")
        if not self.cfg.allow_urls:
            raise UserError(f"{field}: this server fetches no addresses (--allow-urls); send the file itself")
        return self.fetch(field, text)

    def _keep(self, folder: Path, contents: Mapping[str, bytes]) -> dict[str, Path]:
        folder.mkdir(parents=True)
        uploads = {PLACES[field]: folder / PLACES[field] for field in contents}
        for field, content in contents.items():
            uploads[PLACES[field]].write_bytes(content)
        return uploads

    def _prepare(self, asked: GenerationRequest, uploads: Mapping[str, Path]) -> Any:
        """See :meth:`Desk.prepare`; messages name fields, not files of the server."""
        try:
            return self.desk.prepare(asked, uploads)
        except UserError as error:
            text = str(error)
            for field, name in PLACES.items():
                text = text.replace(str(uploads.get(name, "\0")), field)
            if text != str(error):
                raise UserError(text) from None
            raise

    def _check_room(self) -> None:
        waiting = self.store.counts()["queued"]
        if waiting >= self.cfg.max_queue:
            raise QueueFull(f"{waiting} jobs are waiting, as many as may; try again later")
        looked, has_room = self._room
        if time.monotonic() - looked > LOOK or not has_room:
            has_room = self.folders.has_room(self.cfg.max_disk * GIB)
            self._room = time.monotonic(), has_room
        if not has_room:
            raise NoRoom("results fill the room that this server has for them; delete some, or try again later")

    # ------------------------------------------------------------------------------------------------------------ jobs

    def cancel(self, id: str) -> bool:
        """Cancel a job; says whether it was still to be made."""
        return self.store.cancel(id)

    def remove(self, id: str) -> None:
        """Delete a job with all its files; one that is being made is stopped."""
        self.store.cancel(id)
        self.store.remove(id)
        self.folders.remove(id)

    def expires(self, job: Job) -> float | None:
        """When a finished job is deleted, in seconds since the epoch."""
        return None if job.finished is None else job.finished + 3600 * self.cfg.keep_hours

    def sweep(self) -> int:
        """Delete jobs that have expired; how many."""
        expired = self.store.finished_before(time.time() - 3600 * self.cfg.keep_hours)
        for job in expired:
            self.remove(job.id)
        return len(expired)

    def _sweep_always(self) -> None:
        while True:
            try:
                if count := self.sweep():
                    logger.info("%d jobs have expired and are deleted", count)
            except OSError as error:
                logger.warning("expired jobs cannot be deleted: %s", error)
            if self._stopping.wait(SWEEP):
                return


def _address_in(field: str, value: Any) -> str:
    """The text of a reference: itself, or ``image_url`` of an object."""
    if isinstance(value, Mapping):
        if set(value) != {"image_url"}:
            raise UserError(f'{field}: expected a file, or {{"image_url": ...}}; files by id are not kept here')
        value = value["image_url"]
    if not isinstance(value, str):
        raise UserError(f"{field}: expected a file, or an address as text")
    return value
