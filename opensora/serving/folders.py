"""Where a server keeps things: a folder for each job, beside the database of all of them."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from opensora.utils.files import remove_folder, remove_unfinished_files, remove_unfinished_folders

PREVIEW, THUMBNAIL, SHEET = "preview.webp", "thumbnail.webp", "spritesheet.jpg"
READY = "worker.ready"  # a worker has loaded its models
FREE = 64 * 2**20  # bytes that a disk must have left


class Folders:
    """The places below ``data_dir``."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.database = self.root / "jobs.sqlite"
        self.jobs = self.root / "jobs"
        self.worker = self.root / "worker"  # claimed by the worker; its settings stand in worker.json
        self.settings = self.root / "worker.json"

    def of(self, id: str) -> Path:
        """Folder of a job."""
        return self.jobs / id

    def stem(self, id: str) -> Path:
        """Its result, without ending."""
        return self.of(id) / "video"

    def result(self, id: str) -> Path | None:
        """Its result, once it is there."""
        stem = self.stem(id)
        return next((path for ending in (".mp4", ".png") if (path := stem.with_suffix(ending)).is_file()), None)

    def remove(self, id: str) -> None:
        """Delete what a job left."""
        with suppress(FileNotFoundError):  # there is none, or another process deletes it
            remove_folder(self.of(id))

    def clean(self, known: Iterable[str]) -> None:
        """Delete what killed processes were writing, and folders of jobs that are not known."""
        remove_unfinished_files(self.root)
        if not self.jobs.is_dir():
            return
        remove_unfinished_folders(self.jobs, "*")
        names = set(known)
        for folder in self.jobs.iterdir():
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def used(self) -> int:
        """Bytes of all files."""
        total = 0
        for path in self.root.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except OSError:  # deleted meanwhile
                continue
        return total

    def has_room(self, most: float) -> bool:
        """Whether less than ``most`` bytes are used, and the disk has some left."""
        return shutil.disk_usage(self.root).free > FREE and self.used() < most
