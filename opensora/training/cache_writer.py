"""Writer of the caches that :mod:`opensora.encoded.dataset` reads."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from opensora.acceleration.devices import pick_device, torch_dtype
from opensora.datasets.buckets import BucketTable
from opensora.datasets.dataset import SampleKey, VideoTextDataset
from opensora.datasets.sampler import BucketBatchSampler
from opensora.datasets.table import row_name, row_number, write_table
from opensora.datasets.video_io import BrokenMediaError
from opensora.encoded.dataset import SIZE_COLUMN, WHOLE, CacheInfo, file_bytes, run_name, shard_path, text_hash
from opensora.encoded.replacing import BROKEN, DESCRIPTION, INDEX, NEW, check_ours, drop_new, finish_replacing
from opensora.models.build import check_weights
from opensora.registry import DATASETS, MODELS, build_module
from opensora.training.cached import (
    condition_pixels,
    condition_runs,
    describe_command,
    meta_autoencoder,
    plain_section,
    text_fingerprint,
    video_fingerprint,
)
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import remove_unfinished_files, write_text
from opensora.utils.logging import get_logger
from opensora.utils.weights_writing import save_safetensors

logger = get_logger(__name__)

TEXT_BATCH = 16  # texts embedded at a time
CLIP_BATCH = 8  # clips of one size encoded at a time, if batch_size does not say


@dataclass(frozen=True)
class CachePlan:
    """What a cache is to hold, in order: clips sorted by bucket and row, texts by first use (number 0 is empty)."""

    keys: list[SampleKey]
    texts: list[str]
    text_numbers: list[int]  # of each key
    paths: list[str]

    def digest(self) -> str:
        """Hash that two equal plans share."""
        digest = hashlib.sha256()
        for key, number, path in zip(self.keys, self.text_numbers, self.paths):
            digest.update(repr((*key, number, Path(path).name)).encode())
        for text in self.texts:
            digest.update(repr(text).encode())
        return digest.hexdigest()[:16]


def make_plan(dataset: VideoTextDataset, sampler: BucketBatchSampler) -> CachePlan:
    """Every row that has a bucket in the first epoch, with the window of frames that the epoch would see."""
    assigned = sampler.assigned(0)
    numbers: dict[str, int] = {"": 0}
    entries = []
    for index in np.flatnonzero(assigned >= 0).tolist():  # in the table's order, which shards are quickly read in
        key, row = sampler.sample_key(index, int(assigned[index])), dataset.row(index)
        entries.append((key, numbers.setdefault(dataset.caption(key, row), len(numbers)), str(row["path"])))
    entries.sort(key=lambda entry: assigned[entry[0].row])  # stable: by row within a bucket
    return CachePlan([e[0] for e in entries], list(numbers), [e[1] for e in entries], [e[2] for e in entries])


class CacheWriter:
    """Computes the latents and text embeddings of a training config's clips, shard by shard.

    A shard is written whole or not at all, and one that is there is not computed again: a run that was stopped goes
    on where it was. Rows that cannot be read are left out and listed in ``broken.csv`` of the cache.

    Args:
        cfg: resolved config (``CacheOptions``).

    Raises:
        UserError: anything wrong with config or table; a cache in the folder that was made with something else.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        for key in ("dataset", "bucket_config"):
            if not cfg.get(key):
                raise UserError(f"{cfg.config_path}: '{key}' is missing; a cache needs dataset and bucket_config")
        folder = cfg.cache_dir or cfg.dataset.get("cache_dir")
        if not folder:
            raise UserError("cache_dir is not set: say where to write, e.g. --cache-dir caches/clips")
        if cfg.cache_shard_size < 1:
            raise UserError(f"cache_shard_size={cfg.cache_shard_size}: must be at least 1")
        self.parts = ("video", "text") if cfg.cache_parts == "both" else (cfg.cache_parts,)
        for section in ("ae", *(("t5", "clip") if "text" in self.parts else ())):
            if not cfg.get(section):
                raise UserError(f"{cfg.config_path}: '{section}' is missing")
        self.folder = Path(folder)
        self.device, self.dtype = pick_device(cfg.device), torch_dtype(cfg.dtype)
        self.ae = meta_autoencoder(cfg)
        self.dataset = self._dataset()
        table = BucketTable(cfg.bucket_config, self.ae.compression[1] * cfg.patch_size)
        self.sampler = BucketBatchSampler(self.dataset, _single(table), cfg.seed)
        self.plan = make_plan(self.dataset, self.sampler)
        lengths = sorted({key.num_frames for key in self.plan.keys})
        self.runs = sorted({run for n in lengths for run in condition_runs(cfg.condition_config, self.ae, n)})
        self.info = CacheInfo(
            video=video_fingerprint(cfg) if "video" in self.parts else None,
            text=text_fingerprint(cfg) if "text" in self.parts else None,
            runs=[WHOLE, *(run_name(*run) for run in self.runs)],
            plan=self.plan.digest(),
            clips=len(self.plan.keys),
            shard_size=cfg.cache_shard_size,
            config=describe_command(cfg, self.folder),
        )
        self.metadata = {"cache": self.info.to_json()}

    def _dataset(self) -> VideoTextDataset:
        return build_module({**plain_section(self.cfg), "keep_in_memory": False}, DATASETS)

    def run(self) -> Path:
        """Write what is not there yet; returns the folder.

        Raises:
            UserError: a cache in the folder that was made with something else, or files that are no cache's; another
                process that writes there; no clip can be read.
        """
        place = self.folder
        with claimed(place, wait=self.cfg.wait, advice="--wait True waits for it"):
            finish_replacing(place)
            check_ours(place)
            self.folder = self._start()
            remove_unfinished_files(self.folder, "[0-9]*.safetensors.partial")
            logger.info("%d clips, %d texts\n%s", len(self.plan.keys), len(self.plan.texts), self.sampler.describe(0))
            if "text" in self.parts:
                self._write_texts()
            if "video" in self.parts:
                self._write_clips()
            self._write_index()
            self.folder = place
            finish_replacing(place)
        return place

    def _start(self) -> Path:
        """Where to write: the folder, or, with ``overwrite``, ``.new`` in it as long as another cache is there."""
        changed = self._changed(self.folder)
        if changed is None:
            write_text(self.info.to_json(), self.folder / DESCRIPTION)
        elif self.cfg.overwrite:
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
            there: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            there = {}
        ours = json.loads(self.info.to_json())
        return [key for key in ours if key != "config" and ours[key] != there.get(key)]

    def _shards(self, count: int) -> Iterator[tuple[int, range]]:
        """Numbers of the shards of ``count`` things, and what each holds."""
        size = self.cfg.cache_shard_size
        for number, first in enumerate(range(0, count, size)):
            yield number, range(first, min(first + size, count))

    def _missing(self, kind: str, count: int) -> list[tuple[int, range]]:
        return [(n, items) for n, items in self._shards(count) if not shard_path(self.folder, kind, n).is_file()]

    def _encoder(self, section: str) -> Any:
        check_weights(section, self.cfg[section])
        model = build_module(dict(self.cfg[section]), MODELS, device_map=str(self.device), torch_dtype=self.dtype)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def _write_texts(self) -> None:
        missing = self._missing("text", len(self.plan.texts))
        if not missing:
            return
        t5, clip = self._encoder("t5"), self._encoder("clip")
        done = len(self.plan.texts) - sum(len(items) for _, items in missing)
        with tqdm(total=len(self.plan.texts), initial=done, unit="text", mininterval=1.0) as bar:
            for number, items in missing:
                tensors: dict[str, Tensor] = {}
                for first in range(items.start, items.stop, TEXT_BATCH):
                    part = range(first, min(first + TEXT_BATCH, items.stop))
                    texts = [self.plan.texts[i] for i in part]
                    for i, txt, vec in zip(part, t5(texts).cpu(), clip(texts).cpu()):
                        tensors |= {f"{i}.t5": txt.clone(), f"{i}.clip": vec.clone()}
                    bar.update(len(part))
                save_safetensors(tensors, shard_path(self.folder, "text", number), self.metadata)

    @torch.no_grad()
    def _write_clips(self) -> None:
        missing = self._missing("video", len(self.plan.keys))
        if not missing:
            return
        self.ae = self._encoder("ae")
        groups = [(number, group) for number, items in missing for group in self._groups(items)]
        loader = DataLoader(
            _Clips(self.dataset),
            batch_sampler=[group for _, group in groups],
            collate_fn=list,
            num_workers=self.cfg.num_workers,
            pin_memory=False,
        )
        total = len(self.plan.keys)
        done = total - sum(len(items) for _, items in missing)
        tensors: dict[str, Tensor] = {}
        broken: dict[int, str] = {}
        with tqdm(total=total, initial=done, unit="clip", mininterval=1.0) as bar:
            for place, ((number, _), clips) in enumerate(zip(groups, loader)):
                for key, clip in clips:
                    if isinstance(clip, str):
                        broken[key.row] = clip
                        logger.warning("%s is left out: %s", row_name(self.dataset.data_path, key.row), clip)
                tensors |= self._encode([(key, clip) for key, clip in clips if torch.is_tensor(clip)])
                bar.update(len(clips))
                if place + 1 == len(groups) or groups[place + 1][0] != number:
                    metadata = {**self.metadata, "broken": json.dumps(broken)}
                    save_safetensors(tensors, shard_path(self.folder, "video", number), metadata)
                    tensors, broken = {}, {}

    def _groups(self, items: range) -> Iterator[list[SampleKey]]:
        """Clips of a shard in batches of one size."""
        limit = self.cfg.batch_size or CLIP_BATCH
        group: list[SampleKey] = []
        for key in (self.plan.keys[i] for i in items):
            if group and (key[1:4] != group[0][1:4] or len(group) == limit):
                yield group
                group = []
            group.append(key)
        yield group

    def _encode(self, clips: list[tuple[SampleKey, Tensor]]) -> dict[str, Tensor]:
        """Moments of whole clips and of the runs of frames that conditions give, by name in the shard."""
        if not clips:
            return {}
        video = torch.stack([clip for _, clip in clips]).to(self.device, self.dtype)
        needed = condition_runs(self.cfg.condition_config, self.ae, video.shape[2])
        runs = {WHOLE: video, **condition_pixels(video, needed)}
        return {
            f"{key.row}.{name}": moments.clone()
            for name, pixels in runs.items()
            for (key, _), moments in zip(clips, self.ae.encode_stored(pixels).cpu())
        }

    def _write_index(self) -> None:
        """The table of what is there; its presence says that the cache is whole."""
        broken: dict[int, str] = {}
        if "video" in self.parts:
            for number, _ in self._shards(len(self.plan.keys)):
                with safe_open(shard_path(self.folder, "video", number), "pt") as file:
                    broken |= {int(row): why for row, why in json.loads(file.metadata()["broken"]).items()}
        size = self.cfg.cache_shard_size
        entries = [
            (key.row, *key[1:4], place // size, text, text // size, text_hash(self.plan.texts[text]), path)
            for place, (key, text, path) in enumerate(zip(self.plan.keys, self.plan.text_numbers, self.plan.paths))
            if key.row not in broken
        ]
        names = ["row", "num_frames", "height", "width", "video_shard", "text", "text_shard", "text_hash", "path"]
        table = pd.DataFrame(entries, columns=names)
        table["path_hash"] = [text_hash(Path(path).name) for path in table["path"]]
        table[SIZE_COLUMN] = [file_bytes(path) for path in table["path"]]
        if broken:
            lines = [(row_number(row), why) for row, why in sorted(broken.items())]
            write_table(pd.DataFrame(lines, columns=["row", "error"]), self.folder / BROKEN)
        if table.empty:
            raise UserError(f"{self.dataset.data_path}: no clip could be read; see {self.folder / 'broken.csv'}")
        write_table(table, self.folder / INDEX)
        logger.info("%d clips in %s, %d unreadable ones left out", len(table), self.folder, len(broken))


class _Clips(Dataset):
    """Pixels by key; the reason instead, where a clip cannot be read."""

    def __init__(self, dataset: VideoTextDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: SampleKey) -> tuple[SampleKey, Tensor | str]:
        try:
            return key, self.dataset.clip(key, self.dataset.row(key.row))
        except BrokenMediaError as error:
            return key, str(error)


def _single(table: BucketTable) -> BucketTable:
    """Every row counts, whether or not it fills a batch: the check for full batches must not refuse small tables."""
    table.buckets = [replace(bucket, batch_size=1) for bucket in table.buckets]
    return table
