"""What a checkpoint holds, and the files of it: tensors are cut into shards that the ranks write, each its own.

Written at once, a shard is put together while the one before is on its way, so a rank holds two at most. How many there
are shows only at the end; until then they carry provisional names.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.acceleration.parallel_context import Axis
from opensora.training.checkpoint.folder import STATES, RunningStates
from opensora.utils.files import flush, write_json
from opensora.utils.weights import index_of
from opensora.utils.weights_writing import save_safetensors

STATE_FILE, TENSORS_FILE = "state.pt", "state.safetensors"  # of an optimizer: the second holds its tensors


@dataclass
class CheckpointContent:
    """Everything that a checkpoint holds. Tensors may be put together as they are read, by all ranks at once.

    Attributes:
        states: where the run stands.
        model: weights; ``model/model.safetensors``, or an adapter's, see ``write_adapter_config``.
        optimizers: state dicts by name; ``<name>/state.pt`` and ``<name>/state.safetensors``.
        ema: averaged weights; ``ema.safetensors``.
        extra_models: further weights by name; ``<name>/model.safetensors``.
        metadata: strings for the header of the weight files (layouts).
        master: fp32 copies of the weights; ``master.safetensors``.
        write_adapter_config: writes ``adapter_config.json`` into a folder. With it, ``model`` and ``ema`` are a LoRA
            adapter's weights and become the PEFT folders ``lora`` and ``lora_ema``.
    """

    states: RunningStates
    model: Mapping[str, Tensor]
    optimizers: Mapping[str, Any]
    ema: Mapping[str, Tensor] | None = None
    extra_models: Mapping[str, Mapping[str, Tensor]] | None = None
    metadata: Mapping[str, str] | None = None
    master: Mapping[str, Tensor] | None = None
    write_adapter_config: Callable[[Path], None] | None = None

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """Weights by the file that they would make in one piece."""
        adapter = self.write_adapter_config is not None
        found = {
            "lora/adapter_model.safetensors" if adapter else "model/model.safetensors": self.model,
            "lora_ema/adapter_model.safetensors" if adapter else "ema.safetensors": self.ema,
            "master.safetensors": self.master,
            **{f"{name}/model.safetensors": weights for name, weights in (self.extra_models or {}).items()},
        }
        return {name: weights for name, weights in found.items() if weights}


@dataclass
class Shard:
    """One file of tensors.

    Attributes:
        whole: name of the file that all shards together stand for, in the checkpoint.
        number: counted from 1.
        metadata: strings for its header.
        names: of its tensors.
        size: of its tensors, in bytes.
        tensors: themselves, in host memory; empty on ranks that do not write this shard.
    """

    whole: str
    number: int
    metadata: Mapping[str, str]
    names: list[str] = field(default_factory=list)
    size: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def name(self, count: int | None = None) -> str:
        """Its file in the checkpoint, one of ``count``; None as long as nobody knows how many there are."""
        stem = self.whole.removesuffix(".safetensors")
        return f"{stem}-{self.number:05}" + (f"-of-{count:05}" if count is not None else "") + ".safetensors"

    def write(self, folder: Path) -> None:
        """Write it under its provisional name, and let go of its tensors."""
        save_safetensors(self.tensors, folder / self.name(), dict(self.metadata))
        self.tensors.clear()
        flush(folder / self.name())


class HostCopies:
    """Copies in host memory that is kept from one checkpoint to the next: getting fresh memory takes several times as
    long as filling it. Of tensors on a GPU it is page-locked, so that they come at the full rate of the bus."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor, which is complete once `finish` has been called; the one before of this name is gone."""
        self._used.add(name)
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Wait for the copies that were begun, and let go of memory that none of them took."""
        if any(copy.is_pinned() for copy in self._kept.values()):
            torch.cuda.current_stream().synchronize()
        self._kept = {name: kept for name, kept in self._kept.items() if name in self._used}
        self._used.clear()


def as_they_are(name: str, tensor: Tensor) -> Tensor:
    """A tensor in host memory, itself if it is there."""
    return tensor.to("cpu")


class CheckpointFiles:
    """The files of one checkpoint. Every rank goes through all `shards`; the first one then calls `complete`.

    Args:
        content: what the checkpoint holds.
        ranks: all processes.
        limit: size of a shard in bytes; one tensor may be larger.
        to_host: from a name, the same at each checkpoint, and a tensor to what is written of it; :class:`HostCopies`
            where training may change it meanwhile.
    """

    def __init__(
        self,
        content: CheckpointContent,
        ranks: Axis,
        limit: int,
        to_host: Callable[[str, Tensor], Tensor] = as_they_are,
    ) -> None:
        self.content, self.ranks, self.limit, self.to_host = content, ranks, limit, to_host
        self._done: list[Shard] = []
        self._rest: dict[str, dict[str, Any]] = {}

    def shards(self) -> Iterator[Shard]:
        """All of them, with tensors where this rank is to write them."""
        metadata = self.content.metadata or {}
        for name, weights in self.content.weights().items():
            # adapters are small, and PEFT reads one file
            yield from self._cut(name, weights.items(), metadata, None if name.startswith("lora") else self.limit)
        for name, state in self.content.optimizers.items():
            yield from self._cut(f"{name}/{TENSORS_FILE}", self._tensors_of(name, state), {}, self.limit)

    def _cut(
        self, whole: str, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str], limit: int | None
    ) -> Iterator[Shard]:
        shard = Shard(whole, 1, metadata)
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if shard.names and limit is not None and shard.size + size > limit:
                yield self._finished(shard)
                shard = Shard(whole, shard.number + 1, metadata)
            shard.names.append(name)
            shard.size += size
            if len(self._done) % self.ranks.size == self.ranks.rank:  # in turn, through all of the checkpoint
                shard.tensors[name] = self.to_host(f"{whole}/{name}", tensor.detach())
        if shard.names:
            yield self._finished(shard)

    def _finished(self, shard: Shard) -> Shard:
        self._done.append(Shard(shard.whole, shard.number, {}, shard.names, shard.size))
        return shard

    def _tensors_of(self, optimizer: str, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of an optimizer's state; numbers and groups are kept for `complete`."""
        rest = self._rest[optimizer] = {key: copy.deepcopy(value) for key, value in state.items() if key != "state"}
        if "state" not in state:
            return
        rest["state"] = {}
        for index, values in state["state"].items():
            numbers = rest["state"][index] = {}
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim:
                    yield f"{index}.{key}", value
                else:
                    numbers[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    def complete(self, folder: Path, states: RunningStates) -> None:
        """Give the written shards their names, and write the small files."""
        by_whole: dict[str, list[Shard]] = {}
        for shard in self._done:
            by_whole.setdefault(shard.whole, []).append(shard)
        for whole, shards in by_whole.items():
            if len(shards) == 1:
                (folder / shards[0].name()).rename(folder / whole)
                continue
            for shard in shards:
                (folder / shard.name()).rename(folder / shard.name(len(shards)))
            place = {name: Path(shard.name(len(shards))).name for shard in shards for name in shard.names}
            index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": place}
            _write_json(index_of(folder / whole), index)
        for name, rest in self._rest.items():
            (folder / name).mkdir(exist_ok=True)
            torch.save(rest, folder / name / STATE_FILE)
            flush(folder / name / STATE_FILE)
        if self.content.write_adapter_config is not None:
            for adapter in folder.glob("lora*"):
                self.content.write_adapter_config(adapter)
        _write_json(folder / STATES, asdict(states))


def _write_json(file: Path, content: Any) -> None:
    flush(write_json(content, file))
