"""Models whose linear layers are quantised while they are loaded, a tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.config.choices import QUANTIZERS
from opensora.config.options import ModelOptions
from opensora.models.quantization.kinds import METADATA, Part, Quantizer
from opensora.models.quantization.linear import QuantizedLinear
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import WeightFiles, index_of, is_costly, open_weights, resolve_path

logger = get_logger(__name__)

Covers = Callable[[str], bool]
BLOCK = 64  # side of a weight that any kind takes, to ask for the names of its tensors


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a model are, or may be, quantised.

    Attributes:
        covers: which linear layers, by the name of the module.
        wanted: kind that the config names, or None; a file of quantised weights is loaded as it is in any case.
        section: of the config, for messages.
    """

    covers: Covers
    wanted: str | None = None
    section: str = "model"

    def kind(self, weights: WeightFiles | None) -> str | None:
        """Kind of the weights once they are loaded; None for weights that stay as they are.

        Raises:
            UserError: the config names another one than the file has, an unknown one, or one whose package is missing.
        """
        stored = weights.metadata.get(METADATA) if weights is not None else None
        if stored is not None and self.wanted not in (None, stored):
            assert weights is not None
            raise UserError(
                f"{self.section}.quantize={self.wanted}, but the weights in {weights.path} are quantised as {stored}: "
                f"leave {self.section}.quantize out, or give the weights that they were made from"
            )
        kind = stored or self.wanted
        if kind is not None:
            where = f"{self.section}.quantize={kind}" if stored is None else f"{weights and weights.path} ({kind})"
            if kind not in QUANTIZERS:
                raise UserError(f"{where}: unknown kind of quantised weights; known: {QUANTIZERS.listing}")
            QUANTIZERS.get(kind).check(where)
        return kind

    def quantizer(self, weights: WeightFiles | None) -> Quantizer | None:
        """That of :meth:`kind`. Raises as it does."""
        kind = self.kind(weights)
        return None if kind is None else QUANTIZERS.get(kind)()

    def stored_parts(self, weights: WeightFiles) -> set[str]:
        """Names of the tensors of a file that stand for weights: none in one whose weights are not quantised.

        Raises:
            UserError: see :meth:`kind`.
        """
        quantizer = self.quantizer(weights)
        if quantizer is None or METADATA not in weights.metadata:
            return set()
        first, *others = quantizer.layout(BLOCK, BLOCK)
        found = (key.removesuffix(f".{first}") for key in weights.shapes if key.endswith(f".{first}"))
        return {f"{module}.{part}" for module in found if self.covers(module) for part in (first, *others)}

    def replace(
        self, model: nn.Module, weights: WeightFiles | None, dtype: torch.dtype | None
    ) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
        """Put quantised linear layers, empty, into a model on the meta device.

        Args:
            model: changed in place, if the weights are or shall be quantised.
            weights: that it will get.
            dtype: that it will have; None is float32.

        Returns:
            What makes of a stored tensor those of the model, by name.
        """
        quantizer = self.quantizer(weights)
        if quantizer is not None:
            for name, module in self._layers(model, quantizer):
                model.set_submodule(name, QuantizedLinear(module, quantizer, dtype or torch.float32))

        def pack(key: str, tensor: Tensor) -> Mapping[str, Tensor]:
            name, _, leaf = key.rpartition(".")
            module = model.get_submodule(name) if leaf == "weight" else None
            if not isinstance(module, QuantizedLinear):
                return {key: tensor}
            return {f"{name}.{part}": value for part, value in packed(module.quantizer, tensor).items()}

        return pack

    def replace_filled(self, model: nn.Module) -> None:
        """Quantise the linear layers of a model that has its weights, one after the other."""
        quantizer = self.quantizer(None)
        if quantizer is not None:
            for name, module in self._layers(model, quantizer):
                layer = QuantizedLinear(module, quantizer, module.weight.dtype)
                for part, value in packed(quantizer, module.weight.detach()).items():
                    setattr(layer, part, nn.Parameter(value, requires_grad=False))
                model.set_submodule(name, layer)

    def _layers(self, model: nn.Module, quantizer: Quantizer) -> Iterator[tuple[str, nn.Linear]]:
        names = [name for name, _ in model.named_modules() if self.covers(name)]  # no modules: replaced ones can go
        for name in names:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear) or isinstance(module, QuantizedLinear):
                continue
            if quantizer.fits(module.out_features, module.in_features):
                yield name, module

    def layout(
        self, shapes: Mapping[str, tuple[int, ...]], weights: WeightFiles | None = None
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, Part]]:
        """What the weights of these shapes become: those that stay, and the tensors that stand for the others."""
        quantizer = self.quantizer(weights)
        kept, parts = dict(shapes), dict[str, Part]()
        if quantizer is None:
            return kept, parts
        for key, shape in shapes.items():
            name, _, leaf = key.rpartition(".")
            if leaf == "weight" and len(shape) == 2 and self.covers(name) and quantizer.fits(*shape):
                del kept[key]
                parts |= {f"{name}.{part}": value for part, value in quantizer.layout(*shape).items()}
        return kept, parts


@torch.no_grad()
def packed(quantizer: Quantizer, weight: Tensor) -> dict[str, Tensor]:
    """A weight quantised, on a GPU where there is one, and back on its device."""
    home = weight.device
    worker = torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    return {name: value.to(home) for name, value in quantizer.pack(weight.to(worker)).items()}


def quantize_tensors(
    tensors: Iterable[tuple[str, Tensor]], covers: Covers, quantizer: Quantizer
) -> Iterator[tuple[str, Tensor]]:
    """A state dict, tensor by tensor, with quantised weights where they are covered."""
    for key, tensor in tensors:
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2 and covers(name) and quantizer.fits(*tensor.shape):
            yield from ((f"{name}.{part}", value) for part, value in packed(quantizer, tensor).items())
        else:
            yield key, tensor


def tell(name: str, model: nn.Module, device: torch.device) -> None:
    """Say in the log what of a model is approximate, and how the device where it works computes with it."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if layers:
        kind, how = kind_of_module(model), layers[0].quantizer.works_as(device)
        logger.info("%s: approximate, the weights of %d linear layers are in %s (%s)", name, len(layers), kind, how)


def kind_of_module(model: nn.Module) -> str | None:
    """Kind of a model's quantised weights, None where they are not quantised."""
    quantizer = next((each.quantizer for each in model.modules() if isinstance(each, QuantizedLinear)), None)
    if quantizer is None:
        return None
    return next((each for each in QUANTIZERS if QUANTIZERS.get(each) is type(quantizer)), type(quantizer).__name__)


def stored_kind(path: str | Path | None, cache_dir: str | None = None) -> str | None:
    """Kind of the quantised weights in a file or folder; None for others, and where none are at hand."""
    local = Path(path or "").expanduser()
    if not path or not (local.exists() or index_of(local).is_file()):
        return None
    try:
        found = resolve_path(path, cache_dir)
        return None if is_costly(found) else open_weights(found).metadata.get(METADATA)
    except UserError:  # said where it is loaded
        return None


def kind_of_section(section: ModelOptions | None) -> str | None:
    """Kind of the quantised weights of a config section: what it names, or what its file records."""
    if section is None:
        return None
    return getattr(section, "quantize", None) or stored_kind(section.from_pretrained, section.cache_dir)
