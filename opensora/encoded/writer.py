"""Writer of the caches that :mod:`opensora.encoded.store` describes."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from opensora.datasets.buckets import BucketTable
from opensora.datasets.runs import ClipPart, encode_part
from opensora.datasets.sampler import BucketBatchSampler
from opensora.datasets.sharing import SharingLoader
from opensora.datasets.source import ClipSource, SampleKey
from opensora.datasets.table import row_name, row_number, write_table
from opensora.datasets.transforms import as_bytes, in_model_range
from opensora.datasets.video_io import BrokenMediaError
from opensora.encoded.replacing import BROKEN, DESCRIPTION, INDEX, NEW, check_ours, drop_new, finish_replacing
from opensora.encoded.store import SIZE_COLUMN, WHOLE, CacheInfo, file_bytes, shard_path, text_hash
from opensora.utils.claims import POLL_SECONDS, Holder, NameClaims, TakenError, claimed, no_empty_folders
from opensora.utils.errors import UserError
from opensora.utils.files import remove_unfinished_files, write_text
from opensora.utils.logging import get_logger
from opensora.utils.paths import read_text
from opensora.utils.progress import Bar
from opensora.utils.weights_writing import save_safetensors

logger = get_logger(__name__)

TEXT_BATCH = 16  # texts embedded at a time
WAITING = "--wait True waits for it"
VideoEncoder = Callable[[Tensor], Tensor]
"""Clips [B, 3, T, H, W], in [-1, 1] or uint8, to what is stored of them, [B, C, t, h, w], on the CPU."""
TextEncoder = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # B texts to [B, L, D] and [B, D], on the CPU


@dataclass(frozen=True)
class CachePlan:
    """What a cache is to hold, in order: clips sorted by bucket and row, texts by first use (number 0 is empty)."""

    keys: list[SampleKey]
    texts: list[str]
    text_numbers: list[int]  # of each key
    paths: list[str]
    summary: str  # of the buckets, to print

    def digest(self) -> str:
        """Hash that two equal plans share."""
        digest = hashlib.sha256()
        for key, number, path in zip(self.keys, self.text_numbers, self.paths):
            digest.update(repr((*key, number, Path(path).name)).encode())
        for text in self.texts:
            digest.update(repr(text).encode())
        return digest.hexdigest()[:16]


def make_plan(source: ClipSource, table: BucketTable, seed: int) -> CachePlan:
    """Every row that has a bucket in the first epoch, with the window of frames that the epoch would see."""
    # Every row counts, whether or not it fills a batch: the check for full batches must not refuse small tables.
    table.buckets = [replace(bucket, batch_size=1) for bucket in table.buckets]
    sampler = BucketBatchSampler(source, table, seed)
    assigned = sampler.assigned(0)
    numbers: dict[str, int] = {"": 0}
    entries = []
    for index in np.flatnonzero(assigned >= 0).tolist():  # in the table's order, which shards are quickly read in
        key, row = sampler.sample_key(index, int(assigned[index])), source.row(index)
        entries.append((key, numbers.setdefault(source.caption(key, row), len(numbers)), str(row["path"])))
    entries.sort(key=lambda entry: assigned[entry[0].row])  # stable: by row within a bucket
    keys, texts, paths = [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries]
    return CachePlan(keys, list(numbers), texts, paths, sampler.describe(0))


class CacheWriter:
    """Computes the latents and text embeddings of clips, shard by shard.

    A shard is written whole or not at all, and one that is there is not computed again: a run that was stopped goes
    on where it was. Rows that cannot be read are left out and listed in ``broken.csv`` of the cache.

    Several writers, on any machines that share the folder, may each write a part of one cache: every so many-th shard.
    Whoever writes the last shard finishes the cache. A part that was stopped is given to another writer.

    Args:
        folder: where to.
        source: the clips.
        plan: what of them, see :func:`make_plan`.
        info: what it is made with; no latents without ``video``, no embeddings without ``text``.
        runs: what to encode on its own, by the length of a clip.
        load_video_encoder, load_text_encoder: called where there is something left to encode.
        overwrite: replace a cache that was made with something else.
        wait: wait while another process writes to the folder, instead of refusing.
        num_workers: processes that read clips.
        batch_size: clips of a size (T, H, W) that are encoded at a time.
        part: number of this writer's part, from 0 on, and how many there are.
    """

    def __init__(
        self,
        folder: Path,
        source: ClipSource,
        plan: CachePlan,
        info: CacheInfo,
        runs: Mapping[int, Sequence[ClipPart]],
        load_video_encoder: Callable[[], VideoEncoder],
        load_text_encoder: Callable[[], TextEncoder],
        *,
        overwrite: bool = False,
        wait: bool = False,
        num_workers: int = 0,
        batch_size: Callable[[tuple[int, int, int]], int] = lambda size: 8,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.place, self.part = folder, part
        self.folder, self.source, self.plan, self.info, self.runs = folder, source, plan, info, runs
        self.load_video_encoder, self.load_text_encoder = load_video_encoder, load_text_encoder
        self.overwrite, self.wait, self.num_workers, self.batch_size = overwrite, wait, num_workers, batch_size
        self.metadata = {"cache": info.to_json()}

    def run(self) -> Path:
        """Write what is not there yet, of this writer's part; returns the folder.

        Raises:
            UserError: a cache in the folder that was made with something else, or files that are no cache's; another
                process that writes there, other than further parts of this cache; no clip can be read.
        """
        number, count = self.part
        with self._claimed_alone() if count == 1 else self._claimed_part(f"part {number} of {count}"):
            logger.info("%d clips, %d texts\n%s", len(self.plan.keys), len(self.plan.texts), self.plan.summary)
            if self.info.text is not None:
                self._write_texts()
            if self.info.video is not None:
                self._write_clips()
            if count == 1:
                self._finish()
        if count > 1:
            with claimed(self.place, wait=True):
                self._finish_with_others()
        self.folder = self.place
        return self.place

    @contextmanager
    def _claimed_alone(self) -> Iterator[None]:
        """Within it nobody else writes to the place."""
        while True:
            with claimed(self.place, wait=self.wait, advice=WAITING):
                others = [*NameClaims(self.place).holders.values()]
                if not others:
                    self._prepare(alone=True)
                    yield
                    return
            self._refuse_or_wait(others[0])

    @contextmanager
    def _claimed_part(self, part: str) -> Iterator[None]:
        """Within it nobody else writes this part, or another cache."""
        cache = f"cache {hashlib.sha256(self.info.to_json().encode()).hexdigest()[:16]}"
        with no_empty_folders(self.place), ExitStack() as held:
            while True:
                with claimed(self.place, wait=True):
                    claims = NameClaims(self.place)
                    others = [*claims.holders.values()]
                    busy = [other for other in others if cache not in other.names or part in other.names]
                    if not busy:
                        held.callback(claims.take([cache, part]).release)
                        self._prepare(alone=not others)
                        break
                self._refuse_or_wait(busy[0])
            yield

    def _refuse_or_wait(self, other: Holder) -> None:
        if not self.wait:
            raise TakenError(f"{self.place} is in use by {other.describe()}; {WAITING}")
        time.sleep(POLL_SECONDS)

    def _prepare(self, alone: bool) -> None:
        """Choose where to write; without others at work, tidy up what was left behind."""
        if alone:
            finish_replacing(self.place)
            check_ours(self.place)
        self.folder = self.place
        self.folder = self._start()
        if alone:
            remove_unfinished_files(self.folder, "[0-9]*.safetensors.partial")

    def _finish(self) -> None:
        self._write_index()
        finish_replacing(self.place)

    def _finish_with_others(self) -> None:
        """Finish the cache, if that is left to do and all parts are there."""
        if not (self.folder / DESCRIPTION).is_file() or (self.folder / INDEX).is_file():
            return
        of_kind = {"video": len(self.plan.keys), "text": len(self.plan.texts)}
        kinds = [kind for kind in of_kind if getattr(self.info, kind) is not None]
        left = sum(len(self._missing(kind, of_kind[kind], (0, 1))) for kind in kinds)
        if not left:
            self._finish()
            return
        logger.info(
            "%s: %d files of other parts are not there yet; the writer of the last one finishes", self.place, left
        )

    def _start(self) -> Path:
        """Where to write: the folder, or, with ``overwrite``, ``.new`` in it as long as another cache is there."""
        changed = self._changed(self.folder)
        if changed is None:
            write_text(self.info.to_json(), self.folder / DESCRIPTION)
        elif self.overwrite:
            new = self.folder / NEW
            if self._changed(new) != []:
                drop_new(self.folder)
                write_text(self.info.to_json(), new / DESCRIPTION)
            return new
        elif changed:
            raise UserError(
                f"{self.folder} holds a cache made with another {', '.join(changed)}: give another --cache-dir, or "
                "--overwrite to replace it"
            )
        return self.folder

    def _changed(self, folder: Path) -> list[str] | None:
        """What the cache in a folder was made with that is something else now; None if there is no cache."""
        try:
            there: dict[str, Any] = json.loads(read_text(folder / DESCRIPTION))
        except FileNotFoundError:
            return None
        except ValueError:
            there = {}
        ours = json.loads(self.info.to_json())
        return [key for key in ours if key != "config" and ours[key] != there.get(key)]

    def _shards(self, count: int) -> Iterator[tuple[int, range]]:
        """Numbers of the shards of ``count`` things, and what each holds."""
        size = self.info.shard_size
        for number, first in enumerate(range(0, count, size)):
            yield number, range(first, min(first + size, count))

    def _missing(self, kind: str, count: int, part: tuple[int, int] | None = None) -> list[tuple[int, range]]:
        """Shards of a part (this writer's) that are not there."""
        own = self._own(count, part or self.part)
        return [(n, items) for n, items in own if not shard_path(self.folder, kind, n).is_file()]

    def _own(self, count: int, part: tuple[int, int]) -> list[tuple[int, range]]:
        number, parts = part
        return [(n, items) for n, items in self._shards(count) if n % parts == number]

    def _total(self, count: int) -> int:
        """Things in this writer's shards."""
        return sum(len(items) for _, items in self._own(count, self.part))

    @torch.no_grad()
    def _write_texts(self) -> None:
        missing = self._missing("text", len(self.plan.texts))
        if not missing:
            return
        encode = self.load_text_encoder()
        total = self._total(len(self.plan.texts))
        done = total - sum(len(items) for _, items in missing)
        with Bar(total=total, initial=done, unit="text", mininterval=1.0) as bar:
            for number, items in missing:
                tensors: dict[str, Tensor] = {}
                for first in range(items.start, items.stop, TEXT_BATCH):
                    part = range(first, min(first + TEXT_BATCH, items.stop))
                    texts = [self.plan.texts[i] for i in part]
                    for i, txt, vec in zip(part, *encode(texts)):
                        tensors |= {f"{i}.t5": txt.clone(), f"{i}.clip": vec.clone()}
                    bar.update(len(part))
                save_safetensors(tensors, shard_path(self.folder, "text", number), self.metadata)

    @torch.no_grad()
    def _write_clips(self) -> None:
        missing = self._missing("video", len(self.plan.keys))
        if not missing:
            return
        encode = self.load_video_encoder()
        groups = [(number, group) for number, items in missing for group in self._groups(items)]
        loader = SharingLoader(
            _Clips(self.source, packed=self.num_workers > 0),
            batch_sampler=[group for _, group in groups],
            collate_fn=list,
            num_workers=self.num_workers,
            pin_memory=False,
        )
        total = self._total(len(self.plan.keys))
        done = total - sum(len(items) for _, items in missing)
        tensors: dict[str, Tensor] = {}
        broken: dict[int, str] = {}
        with Bar(total=total, initial=done, unit="clip", mininterval=1.0) as bar:
            for place, ((number, _), clips) in enumerate(zip(groups, loader)):
                for key, clip in clips:
                    if isinstance(clip, str):
                        broken[key.row] = clip
                        logger.warning("%s is left out: %s", row_name(self.source.data_path, key.row), clip)
                tensors |= self._encode([(key, clip) for key, clip in clips if torch.is_tensor(clip)], encode)
                bar.update(len(clips))
                if place + 1 == len(groups) or groups[place + 1][0] != number:
                    metadata = {**self.metadata, "broken": json.dumps(broken)}
                    save_safetensors(tensors, shard_path(self.folder, "video", number), metadata)
                    tensors, broken = {}, {}

    def _groups(self, items: range) -> Iterator[list[SampleKey]]:
        """Clips of a shard in batches of one size."""
        group: list[SampleKey] = []
        for key in (self.plan.keys[i] for i in items):
            if group and (key[1:4] != group[0][1:4] or len(group) == self.batch_size(group[0][1:4])):
                yield group
                group = []
            group.append(key)
        yield group

    def _encode(self, clips: list[tuple[SampleKey, Tensor]], encode: VideoEncoder) -> dict[str, Tensor]:
        """Moments of whole clips and of the runs of frames that conditions give, by name in the shard."""
        if not clips:
            return {}
        rows, pixels = [key.row for key, _ in clips], [clip for _, clip in clips]
        if len({clip.dtype for clip in pixels}) > 1:
            pixels = [in_model_range(clip) for clip in pixels]
        found = {WHOLE: encode(torch.stack(pixels))}
        found |= {run.name: encode_part(run, rows, pixels, encode) for run in self.runs[pixels[0].shape[1]]}
        return {
            f"{row}.{name}": of_row.clone() for name, all_rows in found.items() for row, of_row in zip(rows, all_rows)
        }

    def _write_index(self) -> None:
        """The table of what is there; its presence says that the cache is whole."""
        broken: dict[int, str] = {}
        if self.info.video is not None:
            for number, _ in self._shards(len(self.plan.keys)):
                with safe_open(shard_path(self.folder, "video", number), "pt") as file:
                    broken |= {int(row): why for row, why in json.loads(file.metadata()["broken"]).items()}
        size = self.info.shard_size
        entries = [
            (key.row, *key[1:4], place // size, text, text // size, text_hash(self.plan.texts[text]), path)
            for place, (key, text, path) in enumerate(zip(self.plan.keys, self.plan.text_numbers, self.plan.paths))
            if key.row not in broken
        ]
        names = ["row", "num_frames", "height", "width", "video_shard", "text", "text_shard", "text_hash", "path"]
        table = pd.DataFrame(entries, columns=names)
        table["path_hash"] = [text_hash(Path(path).name) for path in table["path"]]
        table[SIZE_COLUMN] = file_bytes(table["path"].tolist())
        if broken:
            lines = [(row_number(row), why) for row, why in sorted(broken.items())]
            write_table(pd.DataFrame(lines, columns=["row", "error"]), self.folder / BROKEN)
        if table.empty:
            raise UserError(f"{self.source.data_path}: no clip could be read; see {self.folder / BROKEN}")
        write_table(table, self.folder / INDEX)
        logger.info("%d clips in %s, %d unreadable ones left out", len(table), self.folder, len(broken))


class _Clips(Dataset):
    """Pixels by key, as uint8 where that is exact if they are ``packed``; the reason instead, where a clip cannot be
    read."""

    def __init__(self, source: ClipSource, packed: bool) -> None:
        self.source, self.packed = source, packed

    def __getitem__(self, key: SampleKey) -> tuple[SampleKey, Tensor | str]:
        try:
            clip = self.source.clip(key, self.source.row(key.row))
            return key, as_bytes(clip) if self.packed else clip
        except BrokenMediaError as error:
            return key, str(error)
