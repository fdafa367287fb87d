"""Writer of the trajectories that :mod:`opensora.encoded.trajectories` describes."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor

from opensora.config.commands import TrajectoryOptions
from opensora.config.options import ModelOptions
from opensora.datasets.table import write_table
from opensora.diffusion.conditions import build_condition, get_condition
from opensora.diffusion.free import Anywhere, Region
from opensora.diffusion.latents import get_noise
from opensora.diffusion.lora import as_list, split_lora
from opensora.diffusion.pipeline import VideoPipeline
from opensora.diffusion.plan import SamplePlan, make_plan
from opensora.diffusion.prepared import PreparedRun
from opensora.encoded.fingerprint import models_fingerprint
from opensora.encoded.trajectories import DESCRIPTION, INDEX, TEXT, TrajectoryInfo, stored_state, trajectory_shard
from opensora.generation.jobs import job_seed
from opensora.generation.requests import Request, Row, read_requests
from opensora.utils.claims import TakenError, claimed
from opensora.utils.download import naming_addresses
from opensora.utils.errors import UserError
from opensora.utils.files import write_text
from opensora.utils.logging import get_logger
from opensora.utils.main import doing
from opensora.utils.paths import own_command
from opensora.utils.progress import Bar
from opensora.utils.temporary import TemporaryFolder
from opensora.utils.weights import files_hash
from opensora.utils.weights_writing import save_safetensors

logger = get_logger(__name__)

NOT_OF_A_SHARD = frozenset({"config", "plan", "count"})


class Start(NamedTuple):
    """Where a trajectory starts: a prompt with its references, and the seed of its noise."""

    request: Request
    seed: int


def write_trajectories(cfg: TrajectoryOptions, device: torch.device) -> Path:
    """Sample what is not there yet and is nobody else's work; returns the folder.

    Args:
        cfg: resolved config.
        device: where the models work.

    Raises:
        UserError: anything wrong with config, table or weights; a folder of trajectories made with something else.
    """
    with TemporaryFolder() as downloads, naming_addresses(downloads):
        requests = read_requests(cfg, downloads, lambda row, index: with_condition(cfg, row, index))
        run = PreparedRun.of(cfg, device)
        run.plans(request.cond_type for request in requests)
        _check(cfg, run)
        starts = [
            Start(request, job_seed(cfg.seed, request, epoch))
            for epoch in range(cfg.num_sample)
            for request in requests
        ]
        run.check_resources()
        writer = TrajectoryWriter(cfg, run, starts)
        if cfg.dry_run:
            logger.info("%d trajectories of %d forwards each, in %s", len(starts), run.plan.forwards, cfg.save_dir)
            return writer.folder
        return writer.run()


def with_condition(cfg: TrajectoryOptions, row: Row, index: int) -> Row:
    """The row with a condition drawn for it, which takes its references from the clip in its column ``path``.

    Raises:
        UserError: the table has no such column.
    """
    if not cfg.condition_config:
        return row
    if "path" not in row:
        raise UserError("condition_config: references are taken from clips, and the table has no column path")
    names, weights = list(cfg.condition_config), list(cfg.condition_config.values())
    for name in names:
        if isinstance(get_condition(name), Anywhere | Region):
            raise UserError(
                f"condition_config.{name}: a clip alone says no places; give rows cond_type and ref instead"
            )
    (cond_type,) = random.Random(f"{cfg.seed}/{index}/condition").choices(names, weights)
    return {**row, "cond_type": cond_type, "ref": "" if cond_type == "t2v" else row["path"]}


def _check(cfg: TrajectoryOptions, run: PreparedRun) -> None:
    if cfg.use_t2i2v or cfg.plugin == "hybrid":
        raise UserError(f"use_t2i2v={cfg.use_t2i2v}, plugin={cfg.plugin}: trajectories know neither")
    if run.plan.windows is not None:
        raise UserError(
            f"num_frames={run.plan.length} is longer than sampling_option.window={run.plan.num_frames}: a trajectory "
            "is of one window; ask for at most that"
        )
    if run.plan.num_steps % cfg.keep_every:
        raise UserError(
            f"keep_every={cfg.keep_every} does not divide num_steps={run.plan.num_steps}: the last state would be lost"
        )


class TrajectoryWriter:
    """Samples trajectories, shard by shard.

    A shard is written whole or not at all, and one that is there is not made again, also where further rows have come
    since (or fewer are asked for). A process claims a shard while it
    works on it, so that any number of them share the work; what a killed one had begun is free again.

    Args:
        cfg: resolved config.
        run: its models, checked.
        starts: one per trajectory.
    """

    def __init__(self, cfg: TrajectoryOptions, run: PreparedRun, starts: Sequence[Start]) -> None:
        self.cfg, self.prepared, self.starts, self.folder = cfg, run, starts, Path(cfg.save_dir)
        self.info = describe(cfg, run, starts)
        self._made_with = json.dumps({k: v for k, v in asdict(self.info).items() if k not in NOT_OF_A_SHARD})
        self._pipe: VideoPipeline | None = None

    @property
    def pipe(self) -> VideoPipeline:
        """The teacher, loaded when it is first asked for."""
        if self._pipe is None:
            self._pipe = VideoPipeline.from_prepared(self.prepared)
        return self._pipe

    def run(self) -> Path:
        """Write what is missing; returns the folder."""
        with claimed(self.folder, wait=True):
            self._begin()
        left = self._missing()
        with Bar(total=len(self.starts), initial=len(self.starts) - self._count(left), unit="trajectory") as bar:
            while left:
                taken = [number for number in left if not self._write(number, bar)]
                left = [number for number in self._missing() if number not in taken]
        elsewhere = self._missing()
        if elsewhere:
            logger.info("%d files are left to other processes; the last of them ends the work", len(elsewhere))
            return self.folder
        with claimed(self.folder, wait=True):
            self._finish()
        return self.folder

    def _begin(self) -> None:
        """Write the description, or see that it is the one that is there."""
        file = self.folder / DESCRIPTION
        if file.is_file():
            there, ours = asdict(TrajectoryInfo.read(self.folder)), asdict(self.info)
            changed = [key for key in ours if key != "config" and ours[key] != there.get(key)]
            if not changed:
                return
            if not self.cfg.overwrite and not {*changed} <= NOT_OF_A_SHARD:
                raise UserError(
                    f"{self.folder} holds trajectories made with another {', '.join(changed)}: give another "
                    "--save-dir, or --overwrite to replace them"
                )
            (self.folder / INDEX).unlink(missing_ok=True)
        write_text(self.info.to_json(), file)

    def _places(self, number: int) -> range:
        size = self.cfg.shard_size
        return range(number * size, min((number + 1) * size, len(self.starts)))

    def _count(self, numbers: Sequence[int]) -> int:
        return sum(len(self._places(number)) for number in numbers)

    def _missing(self) -> list[int]:
        count = -(-len(self.starts) // self.cfg.shard_size)
        return [number for number in range(count) if not self._is_there(number)]

    def _digest(self, number: int) -> str:
        """What two equal shards share."""
        starts = [fingerprint(self.starts[place]) for place in self._places(number)]
        return hashlib.sha256(f"{self._made_with}{starts}".encode()).hexdigest()[:16]

    def _is_there(self, number: int) -> bool:
        """Whether a file is of these trajectories, rather than of others that they replace."""
        path = trajectory_shard(self.folder, number)
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("trajectories") == self._digest(number)

    def _write(self, number: int, bar: Bar) -> bool:
        """Make a shard, unless it is there by now; false where another process is at it."""
        path = trajectory_shard(self.folder, number)
        try:
            with claimed(path, is_folder=False):
                if not self._is_there(number):
                    save_safetensors(self._shard(number), path, {"trajectories": self._digest(number)})
                bar.update(len(self._places(number)))
        except TakenError:
            return False
        return True

    def _shard(self, number: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for places in self._batches(self._places(number)):
            batch = [self.starts[place] for place in places]
            with doing(", ".join(start.request.where for start in batch)):
                made = trace(self.pipe, batch, self.cfg.keep_every)
            for name, stacked in made.items():
                tensors |= {f"{place}.{name}": one.clone() for place, one in zip(places, stacked)}
        return tensors

    def _batches(self, places: range) -> Iterator[list[int]]:
        """Trajectories of one condition, a batch at a time; the same ones, whichever process makes them."""
        kinds: dict[tuple[str, bool], list[int]] = {}
        for place in places:
            request = self.starts[place].request
            kinds.setdefault((request.cond_type, bool(request.refs)), []).append(place)
        for members in kinds.values():
            for first in range(0, len(members), self.cfg.batch_size):
                yield members[first : first + self.cfg.batch_size]

    def _finish(self) -> None:
        """The empty text, and the table that says that all is there."""
        if (self.folder / INDEX).is_file():
            return
        empty = self.pipe.encode_prompt([""])
        save_safetensors({"t5": empty.txt[0].cpu(), "clip": empty.vec[0].cpu()}, self.folder / TEXT)
        rows = [(start.request.final_text, start.request.cond_type, str(start.seed)) for start in self.starts]
        write_table(pd.DataFrame(rows, columns=["text", "cond_type", "seed"]), self.folder / INDEX)
        logger.info("%d trajectories in %s", len(rows), self.folder)


def trace(pipe: VideoPipeline, starts: Sequence[Start], keep_every: int) -> dict[str, Tensor]:
    """States of a batch of one condition on the teacher's way from noise to data, and what it was conditioned on.

    Args:
        pipe: the teacher.
        starts: of the batch.
        keep_every: distance of the states to keep, in steps.

    Returns:
        ``states [B, S + 1, C, t, h, w]``, ``condition [B, 1 + C, t, h, w]`` where the model takes one,
        ``t5 [B, L, D]``, ``clip [B, D]``.
    """
    requests, seeds = [start.request for start in starts], [start.seed for start in starts]
    plan = _plan(pipe, requests[0])
    refs = pipe.encode_references([list(request.refs) for request in requests], plan, seeds)
    texts = pipe.encode_prompt([*(r.final_text for r in requests), *(r.neg for r in requests)])
    positive, negative = texts.split(len(requests))
    config: Any = pipe.models["model"].config
    noise = get_noise(seeds, config.in_channels // plan.patch_size**2, plan.latent_size, pipe.device)
    states = [stored_state(noise)]

    def keep(step: int, total: int, latents: Tensor) -> None:
        if step % keep_every == 0:
            states.append(stored_state(latents))

    pipe.sample(plan, positive, negative, refs, seeds, keep)
    made = {"states": torch.stack(states, dim=1), "t5": positive.txt.cpu(), "clip": positive.vec.cpu()}
    if config.cond_embed:
        made["condition"] = stored_state(build_condition(noise, plan.cond_type, refs, pipe.spec.is_causal))
    return made


def _plan(pipe: VideoPipeline, request: Request) -> SamplePlan:
    has_refs = bool(request.refs)
    cond_type = request.cond_type if has_refs else "t2v"
    return make_plan(pipe.cfg.sampling_option, pipe.spec, pipe.cfg.patch_size, cond_type, has_refs, pipe.distilled)


def fingerprint(start: Start) -> str:
    """What a trajectory depends on besides the models and the sampling."""
    request = start.request
    names = [Path(ref).name for ref in request.refs]
    return repr((request.final_text, request.cond_type, names, request.neg, start.seed))


def describe(cfg: TrajectoryOptions, run: PreparedRun, starts: Sequence[Start]) -> TrajectoryInfo:
    """What these trajectories are made with."""
    sections: dict[str, ModelOptions] = {name: run.sections[name] for name in ("model", "ae", "t5", "clip")}
    models = models_fingerprint(sections, run.dtype)
    for number, entry in enumerate(as_list(cfg.pretrained_lora_path)):
        path, strength = split_lora(entry)
        models[f"lora.{number}"] = f"{files_hash(path)}@{strength:g}"
    digest = hashlib.sha256()
    for start in starts:
        digest.update(fingerprint(start).encode())
    steps = run.plan.num_steps
    option = asdict(replace(cfg.sampling_option, seed=None))
    left_out = ("given", "chosen", *(() if option["keep_given"] else ("keep_given",)))  # which older ones do not name
    kept = {key: value for key, value in option.items() if key not in left_out}
    command = own_command("trajectories", "scripts/diffusion/trajectories.py")
    return TrajectoryInfo(
        models=models,
        sampling=json.loads(json.dumps(kept)),
        positions=[1 - step / steps for step in range(0, steps + 1, cfg.keep_every)],
        size=[run.plan.num_frames, run.plan.height, run.plan.width],
        plan=digest.hexdigest()[:16],
        count=len(starts),
        shard_size=cfg.shard_size,
        config=f"{command} {cfg.config_path} --save-dir {cfg.save_dir}",
    )
