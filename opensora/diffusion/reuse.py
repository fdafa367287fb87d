"""What stays the same from step to step, or follows from the times alone, computed once per sample and kept.

Shift, scale and gate of all blocks depend on time, pooled text and guidance scale only. A run knows all its times
before it starts, so the layers that make them (a quarter of the released model's weights) work once, one after another,
for the whole run, and are not on the device while it samples. Embedded text tokens and rotary tables are kept as well.
Each is computed from the inputs that the plain forward would compute it from, in batches of the same rows, so that
results are the same to the last bit.

The model's forward is not touched: a :class:`SampleMemo` puts modules in the place of those layers and is told before
each forward which evaluation it is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.acceleration.placing import bytes_of, placed
from opensora.models.diffusion import DiffusionModel
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

MOST = 0.5  # of the weights that a table lets go: the largest that it may be


class Evaluation(NamedTuple):
    """What modulation depends on in one forward.

    Attributes:
        time: diffusion time.
        scale: guidance scale that the model is told, or those of text and image.
        texts: what tells the text of each branch of the batch apart.
    """

    time: float
    scale: float | tuple[float, float]
    texts: tuple[int, ...]


class Known(nn.Module):
    """Stands for a modulation layer whose outputs are known: gives those of the present evaluation.

    Args:
        layer: the layer, which is no part of the model meanwhile.
        find: outputs of the layer for inputs that are only some rows of the evaluation's.
    """

    def __init__(self, layer: nn.Module, find: Callable[["Known", Tensor], Tensor]) -> None:
        super().__init__()
        self.held, self.find = (layer,), find  # in a tuple, so that its weights are not this module's
        self.number = 0
        self.current: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, C]`` -> ``[rows, C']``; as many rows as the evaluation has are taken to be its own, in order."""
        if self.current is None or len(x) != len(self.current):
            return self.find(self, x)
        return self.current


class Kept(nn.Module):
    """Stands for a layer whose input depends on the branches of the batch only: computes it once for each set of them.

    Args:
        layer: whose outputs are kept.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.outputs: dict[tuple[int, ...], Any] = {}
        self.branches: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Any:
        """What the layer makes of ``x``."""
        if self.branches is None:
            return self.layer(x)
        if self.branches not in self.outputs:
            self.outputs[self.branches] = self.layer(x)
        return self.outputs[self.branches]


class Row(NamedTuple):
    """Modulation of one evaluation: input of the layers ``[rows, C]`` and output of each ``[rows, C']``."""

    given: Tensor
    outputs: list[Tensor]


class SampleMemo:
    """What is known of one run of the sampler; see :func:`reused`.

    Args:
        known: stand-ins of the modulation layers, by name.
        kept: of the layers whose input stays the same.
        device: where the layers work.

    Attributes:
        bytes: memory of the table, in the end.
    """

    def __init__(self, known: Mapping[str, nn.Module], kept: Mapping[str, nn.Module], device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.known = {name: Known(layer, self._find) for name, layer in known.items()}
        self.kept = {name: Kept(layer) for name, layer in kept.items()}
        self.rows: dict[Evaluation, Row] = {}
        self.present: Row | None = None
        for number, known_layer in enumerate(self.known.values()):
            known_layer.number = number

    @torch.no_grad()
    def foresee(self, inputs: Mapping[Evaluation, Tensor]) -> None:
        """Compute the outputs of all modulation layers for evaluations to come, layer by layer.

        Args:
            inputs: of the layers ``[rows, C]``, see :meth:`DiffusionModel.modulation_input`.
        """
        new = {evaluation: Row(x, []) for evaluation, x in inputs.items() if evaluation not in self.rows}
        for layer in (each.held[0] for each in self.known.values() if new):
            with placed(layer, self.device):
                for row in new.values():
                    row.outputs.append(layer(row.given))
        self.rows |= new

    def select(self, evaluation: Evaluation, make_input: Callable[[], Tensor]) -> None:
        """Say which evaluation the next forward is; one that was not foreseen is computed now."""
        if self.known and evaluation not in self.rows:
            self.foresee({evaluation: make_input()})
        self.present = self.rows.get(evaluation)
        for each in self.known.values():  # past nn.Module, whose way takes long: this is done for every block
            each.__dict__["current"] = self.present.outputs[each.number] if self.present is not None else None
        for kept in self.kept.values():
            kept.branches = evaluation.texts

    def forget(self) -> None:
        """Let go of all that is kept."""
        self.rows, self.present = {}, None
        for each in self.known.values():
            each.current = None
        for kept in self.kept.values():
            kept.outputs, kept.branches = {}, None

    @torch.no_grad()
    def _find(self, layer: Known, x: Tensor) -> Tensor:
        """Outputs for some of the present evaluation's rows (step caches choose some), or, from others, computed."""
        if self.present is not None:
            same = (x[:, None] == self.present.given[None]).all(dim=-1)  # [rows, rows of the evaluation]
            if bool(same.any(dim=1).all()):
                return self.present.outputs[layer.number][same.int().argmax(dim=1)]
        with placed(layer.held[0], self.device):
            return layer.held[0](x)


@contextmanager
def reused(
    model: DiffusionModel, device: torch.device, evaluations: Collection[Evaluation], batch: int
) -> Iterator[SampleMemo]:
    """Have what stays the same computed once while a sample is made.

    Inside, modulation layers are no part of the model: whoever places its weights leaves theirs where they are.

    Args:
        model: changed inside, as it was afterwards.
        device: where it will work.
        evaluations: those to come.
        batch: samples that are made at once.
    """
    layers = model.modulation_layers()
    rows = table_rows(evaluations, batch)
    if layers and not pays(model, rows):
        logger.debug("precompute: modulation is computed at every step, its table of %d rows would be too large", rows)
        layers = {}
    memo = SampleMemo(layers, model.constant_layers(), device)
    memo.bytes = table_bytes(model, rows) if layers else 0
    replaced = {name: model.get_submodule(name) for name in (*memo.known, *memo.kept)}
    try:
        for name, stand_in in (*memo.known.items(), *memo.kept.items()):
            model.set_submodule(name, stand_in)
        yield memo
    finally:
        for name, layer in replaced.items():
            model.set_submodule(name, layer)
        memo.forget()


def table_rows(evaluations: Collection[Evaluation], batch: int) -> int:
    """Rows of the table of a run; equal evaluations share theirs."""
    return batch * sum(len(each.texts) for each in set(evaluations))


def table_bytes(model: DiffusionModel, rows: int, itemsize: int | None = None) -> int:
    """Memory of the outputs of all modulation layers.

    Args:
        model: with or without weights.
        rows: of samples, branches and evaluations, see :func:`table_rows`.
        itemsize: bytes of a number; None: as the weights are.
    """
    weights: list[Any] = [_plain(layer).weight for layer in model.modulation_layers().values()]
    return rows * sum(weight.shape[0] * (itemsize or weight.element_size()) for weight in weights)


def pays(model: DiffusionModel, rows: int) -> bool:
    """Whether a table of so many rows is well below the weights that it lets go."""
    return table_bytes(model, rows) <= MOST * sum(map(bytes_of, model.modulation_layers().values()))


def _plain(layer: nn.Module) -> nn.Module:
    """A layer without what adapters put beside it."""
    inner = getattr(layer, "base_layer", layer)
    return inner if isinstance(inner, nn.Module) else layer
