"""What trains in a run: the model, and whatever a method trains besides it (a discriminator, a critic)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from opensora.acceleration.engine import Engine
from opensora.training.report.metrics import Value
from opensora.training.weights.masters import MasterWeights
from opensora.training.weights.optimizer import Schedule

MODEL = "model"  # the role that a run is about


class Turn(NamedTuple):
    """One backward pass of a micro-batch.

    Attributes:
        role: name of the role whose weights it is for.
        loss: what they minimise, a scalar.
        metrics: numbers to log.
    """

    role: str
    loss: Tensor
    metrics: Mapping[str, Value]


class RoleFiles(NamedTuple):
    """Folders of a checkpoint that hold a role other than the model.

    Attributes:
        weights: its weights.
        masters: fp32 copies of them.
        optimizer: state of its optimizer.
    """

    weights: str
    masters: str
    optimizer: str

    @classmethod
    def of(cls, name: str, prefix: str) -> "RoleFiles":
        """Those of a role, see :class:`Role`."""
        return cls(name, f"{prefix}_master", f"{prefix}_optimizer")


@dataclass
class Role:
    """A module in training.

    Attributes:
        name: ``model``, or how the role is called in turns and checkpoints.
        engine: the module and its optimizer.
        schedule: learning rate by optimizer step.
        masters: fp32 copies of its weights, if it computes in another dtype and the engine keeps none.
        prefix: starts the names of its metrics and of its further files; the name, if not given.
    """

    name: str
    engine: Engine
    schedule: Schedule
    masters: MasterWeights | None = None
    prefix: str = field(default="")

    def __post_init__(self) -> None:
        self.prefix = self.prefix or self.name

    @property
    def files(self) -> RoleFiles:
        """Where a checkpoint keeps it."""
        return RoleFiles.of(self.name, self.prefix)

    def master_state(self) -> Mapping[str, Tensor]:
        """Whole fp32 weights, where there are such beside those of the forward pass; every rank reads them."""
        if self.masters is None:
            return self.engine.master_state()
        return self.engine.gather(self.masters.state_dict())

    def saved(self) -> dict[str, Mapping[str, Tensor]]:
        """Whole weights by folder of a checkpoint; every rank reads them."""
        weights = {self.files.weights: self.engine.gather(self.engine.unwrap().state_dict())}
        masters = self.master_state()
        return {**weights, self.files.masters: masters} if masters else weights
