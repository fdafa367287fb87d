"""How a stored LoRA adapter changes the modules of a model, and what of it does not fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opensora.diffusion.lora_files import LoraFile, without_prefixes
from opensora.diffusion.lora_products import Product, product_of
from opensora.models.mmdit import MMDiTModel
from opensora.models.mmdit.naming import Piece, other_names, permute_heads
from opensora.utils.errors import UserError, shorten


@dataclass
class LowRank:
    """Change of a linear layer: its weight plus ``up @ down``, of which DoRA sets the length of each row or column.

    Attributes:
        down: [rank, in].
        up: [out, rank], scaled.
        magnitude: of DoRA (arXiv:2402.09353): [out, 1] of rows, [1, in] of columns (LyCORIS and OneTrainer have both),
            or None.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    def lengths(self, weight: Tensor) -> Tensor:
        """What DoRA multiplies every row of ``weight + up @ down`` by, [out, 1], or every column, [1, in]."""
        assert self.magnitude is not None
        changed = torch.addmm(weight.float(), self.up.to(weight.device), self.down.to(weight.device))
        return self.magnitude.to(weight.device) / changed.norm(dim=1 if self.of_rows else 0, keepdim=True)

    @property
    def of_rows(self) -> bool:
        """Whether magnitudes are those of rows."""
        return self.magnitude is not None and self.magnitude.shape[1] == 1


@dataclass(frozen=True)
class Placed:
    """A LoHa or LoKr and the rows of it that a weight gets; they are computed when that is changed.

    Attributes:
        product: of the stored module.
        scale: what it is multiplied by.
        piece: which rows, and where they go.
        head_dim: channels of a head.
    """

    product: Product
    scale: float
    piece: Piece
    head_dim: int

    def add_to(self, weight: Tensor) -> None:
        """Change a weight [out, in] of fp32 in place."""
        rows = cut(self.piece, self.product.dense(self.scale), self.head_dim)
        weight[self.piece.at : self.piece.at + len(rows)] += rows.to(weight.device)


def cut(piece: Piece, values: Tensor, head_dim: int) -> Tensor:
    """The rows of a stored module's values that are a piece, in the order that the model has them in."""
    rows = values if piece.rows is None else values[piece.rows]
    return permute_heads(rows, head_dim, half_split=True) if piece.reorder else rows


@dataclass
class Adapter:
    """An adapter as it fits a model.

    Attributes:
        path: as the user gave it.
        strength: what it is multiplied by; the changes are already.
        changes: by module of the model.
        added: changes of whole parameters, by name.
        products: changes of whole parameters by LoHa and LoKr, by name.
        misfits: what of it does not fit: names by reason.
    """

    path: str
    strength: float
    changes: dict[str, LowRank] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, list[Placed]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    misfits: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Modules of the model that it changes."""
        return len(self.modules)

    @property
    def modules(self) -> set[str]:
        """Their names."""
        return {*self.changes, *(name.rpartition(".")[0] for name in self.whole)}

    @property
    def whole(self) -> list[str]:
        """Parameters that it changes as wholes, whether others are merged or work beside the weights."""
        return list(dict.fromkeys((*self.replaced, *self.added, *self.products)))


class Fit:
    """One stored adapter beside one model, module by module."""

    def __init__(self, model: nn.Module, file: LoraFile, adapter: Adapter) -> None:
        self.file, self.made = file, adapter
        self.linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.parameters = dict(model.named_parameters())
        self.head_dim = 0
        self.places: dict[str, list[Piece]] = {}
        if isinstance(model, MMDiTModel):
            self.head_dim = model.config.head_dim
            self.places = other_names(model.config)
        owners = {name.rpartition(".")[0] for name in self.parameters}
        self.places |= {name: [Piece(name)] for name in sorted(owners)}
        self.places |= {name.replace(".", "_"): pieces for name, pieces in self.places.items()}
        self.parts: dict[str, list[tuple[Tensor, Tensor, int]]] = {}

    def adapter(self) -> Adapter:
        """The adapter with all that fits, and what does not."""
        found: dict[str, list[str]] = {}
        for name in self.file.modules:
            pieces = next((self.places[each] for each in without_prefixes(name) if each in self.places), None)
            if pieces is None or not all(f"{piece.module}.weight" in self.parameters for piece in pieces):
                self._misfit("not in the model", name)
                continue
            self._targeted(name)
            before = found.setdefault(str(pieces), [])
            if before:
                raise UserError(f"{self.file.path}: {before[0]} and {name} are the same module")
            before.append(name)
            self._module(name, self.file.modules[name], pieces)
        if self.file.others:
            self.made.misfits["tensors of an unknown kind"] = self.file.others
        for module, parts in self.parts.items():
            change = self._joined(module, parts)
            magnitude = self.made.changes[module].magnitude if module in self.made.changes else None
            self.made.changes[module] = LowRank(*change, magnitude)
        self._left_out()
        return self.made

    def _misfit(self, reason: str, name: str) -> None:
        self.made.misfits.setdefault(reason, []).append(name)

    def _targeted(self, name: str) -> None:
        saved = self.file.config.get("modules_to_save") or []
        names = [*without_prefixes(name)]
        if "down" in self.file.modules[name] and not any(self.file.targets(each) for each in names):
            targets = self.file.config.get("target_modules") or "all"
            shown = targets if isinstance(targets, str) else shorten(sorted(targets))
            self._misfit(f"not among the target_modules of its config ({shown})", names[-1])
        elif "weight" in self.file.modules[name] and not any(
            each == part or each.endswith(f".{part}") for part in saved for each in names
        ):
            self._misfit("whole weights beside an adapter", names[-1])

    def _module(self, name: str, tensors: Mapping[str, Tensor], pieces: Sequence[Piece]) -> None:
        """Take one stored module to the modules of the model that have its rows."""
        whole = {role: tensors[role] for role in ("weight", "bias", "weight_change", "bias_change") if role in tensors}
        if whole:
            self._whole(name, whole, pieces)
        product = product_of(tensors)
        if product is not None:
            self._product(name, product, "magnitude" in tensors, pieces)
            return
        if not {"down", "up", "magnitude"} & tensors.keys():
            return
        lacking = [role for role in ("down", "up") if role not in tensors]
        if lacking:
            self._misfit(f"without the {lacking[0]}-projection (lora_{'A' if lacking[0] == 'down' else 'B'})", name)
            return
        down, up = (tensors[role].float().flatten(1) for role in ("down", "up"))
        rank, expected = len(down), self.file.rank(name)
        inputs = {self.linear[piece.module].in_features for piece in pieces if piece.module in self.linear}
        rows = self._rows(pieces)
        if inputs != {down.shape[1]} or up.shape != (rows, rank):
            shape = f"{[*down.shape]} and {[*up.shape]}"
            self._misfit("of another shape", f"{name} {shape} instead of [{rank}, {min(inputs, default=0)}] and "
                         f"[{rows}, {rank}]")  # fmt: skip
            return
        if expected is not None and expected != rank:
            self._misfit(f"of rank {rank} where its config says {expected}", name)
            return
        if self.file.config.get("use_dora") and "magnitude" not in tensors:
            self._misfit("without the magnitudes of DoRA, which its config asks for", name)
            return
        scale = self._scale(name, rank)
        up = up * (scale * self.made.strength)
        for piece in pieces:
            self.parts.setdefault(piece.module, []).append((down, cut(piece, up, self.head_dim), piece.at))
        if "up_bias" in tensors:
            self._add(name, pieces, "bias", tensors["up_bias"].float() * (scale * self.made.strength))
        if "magnitude" in tensors:
            self._magnitude(name, tensors["magnitude"].float(), down.shape[1], pieces)

    def _product(self, name: str, product: Product | str, has_magnitude: bool, pieces: Sequence[Piece]) -> None:
        """Take the change of a LoHa or LoKr; it is computed when the weights are there."""
        if isinstance(product, str) or has_magnitude:
            self._misfit(product if isinstance(product, str) else f"DoRA of a {product.kind}", name)
            return
        inputs = {self.parameters[f"{piece.module}.weight"].shape[-1] for piece in pieces}
        if inputs != {product.shape[1]} or product.shape[0] != self._rows(pieces):
            wanted = [self._rows(pieces), min(inputs)]
            self._misfit("of another shape", f"{name} {[*product.shape]} instead of {wanted}")
            return
        scale = 1.0 if product.rank is None else self._scale(name, product.rank)
        for piece in pieces:
            placed = Placed(product, scale * self.made.strength, piece, self.head_dim)
            self.made.products.setdefault(f"{piece.module}.weight", []).append(placed)

    def _scale(self, name: str, rank: int) -> float:
        """Alpha / rank of a module; raises a UserError unless it is finite."""
        scale = self.file.scale(name, rank)
        if not math.isfinite(scale):
            raise UserError(f"{self.file.path}: alpha of {name} is not finite")
        return scale

    def _rows(self, pieces: Sequence[Piece]) -> int:
        """Rows that the stored module has."""
        if pieces[0].rows is None:
            return len(self.parameters[f"{pieces[0].module}.weight"])
        return max(piece.rows.stop for piece in pieces if piece.rows is not None)

    def _magnitude(self, name: str, values: Tensor, inputs: int, pieces: Sequence[Piece]) -> None:
        of_columns = values.ndim > 1 and values.shape[:2] == (1, inputs)
        values = values.reshape(1, -1) if of_columns else values.reshape(-1, 1)
        for piece in pieces:
            part = values if of_columns else cut(piece, values, self.head_dim)
            parts = self.parts[piece.module]
            height = len(self.parameters[f"{piece.module}.weight"])
            other = len(parts[0][1]) != height or (of_columns and len(pieces) > 1)
            if len(parts) != 1 or other or (not of_columns and len(part) != height):
                self._misfit("DoRA of a projection in another layout", name)
                continue
            self.made.changes[piece.module] = LowRank(*parts[0][:2], part)

    def _add(self, name: str, pieces: Sequence[Piece], kind: str, change: Tensor) -> None:
        for piece in pieces:
            key, part = f"{piece.module}.{kind}", cut(piece, change, self.head_dim)
            if key not in self.parameters or part.shape[1:] != self.parameters[key].shape[1:]:
                self._misfit("of another shape", f"{name}.{kind}")
                continue
            total = self.made.added.setdefault(key, torch.zeros(self.parameters[key].shape))
            if piece.at + len(part) > len(total):
                self._misfit("of another shape", f"{name}.{kind}")
                continue
            total[piece.at : piece.at + len(part)] += part

    def _whole(self, name: str, tensors: Mapping[str, Tensor], pieces: Sequence[Piece]) -> None:
        """Whole parameters that were trained beside an adapter, and whole changes of them."""
        for role, value in tensors.items():
            kind = role.removesuffix("_change")
            if role.endswith("_change"):
                self._add(name, pieces, kind, value.float() * self.made.strength)
                continue
            key = f"{pieces[0].module}.{kind}"
            fits = len(pieces) == 1 and pieces[0] == Piece(pieces[0].module) and key in self.parameters
            if fits and self.parameters[key].shape == value.shape:
                self.made.replaced[key] = value
            else:
                self._misfit("of another shape", f"{name}.{kind}")

    def _joined(self, module: str, parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
        """All that changes one module as one pair of matrices."""
        height = len(self.parameters[f"{module}.weight"])
        if len(parts) == 1 and len(parts[0][1]) == height:
            return parts[0][:2]
        rank = sum(len(down) for down, _, _ in parts)
        joined, start = torch.zeros(height, rank), 0
        for down, up, at in parts:
            joined[at : at + len(up), start : start + len(down)] = up
            start += len(down)
        return torch.cat([down for down, _, _ in parts]), joined

    def _left_out(self) -> None:
        """Modules that the config of the adapter names and that got nothing."""
        config = self.file.config
        if not config.get("target_modules") or config.get("layers_to_transform") is not None:
            return
        for name in self.linear:
            if name not in self.made.changes and self.file.targets(name):
                self._misfit("no tensors for modules that its config names", name)
