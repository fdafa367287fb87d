"""A linear layer whose weight is quantised, in place of one whose weight is not."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.quantization.kinds import Parts, Quantizer


class ParameterSize(NamedTuple):
    """A parameter: its numbers, dimensions, and whether it trains."""

    name: str
    numel: int
    ndim: int
    trains: bool


def parameter_sizes(model: nn.Module) -> Iterator[ParameterSize]:
    """Parameters of a model; a quantised weight counts as the weight, not as the tensors that stand for it."""
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        parts: tuple[str, ...] = ()
        if isinstance(module, QuantizedLinear):
            parts = module.names
            yield ParameterSize(f"{start}weight", module.out_features * module.in_features, 2, False)
        for name, parameter in module.named_parameters(recurse=False):
            if name not in parts:
                yield ParameterSize(start + name, parameter.numel(), parameter.ndim, parameter.requires_grad)


class _Product(torch.autograd.Function):
    """``x W^T`` with gradients to ``x``, for which only the quantised weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, names: tuple[str, ...], *parts: Tensor) -> Tensor:
        ctx.quantizer, ctx.names = quantizer, names
        ctx.save_for_backward(*parts)
        return quantizer.linear(x, dict(zip(names, parts, strict=True)), None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        weight = ctx.quantizer.unpack(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), grad.dtype)
        return grad @ weight, None, None, *(None for _ in ctx.names)


class QuantizedLinear(nn.Linear):
    """A linear layer, frozen, whose weight :attr:`parts` stand for; gradients reach its inputs and its bias.

    Args:
        linear: what it stands for; only its sizes are read. The tensors are made, empty, where its weight is.
        quantizer: kind of its weight.
        compute_dtype: what :attr:`weight` is in.
    """

    def __init__(self, linear: nn.Linear, quantizer: Quantizer, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantizer, self.compute_dtype = quantizer, compute_dtype
        layout = quantizer.layout(self.out_features, self.in_features)
        self.names = tuple(layout)
        for name, part in layout.items():
            empty = torch.empty(part.shape, dtype=part.dtype, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    @property
    def parts(self) -> Parts:
        """The tensors that stand for the weight."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight ``[out, in]`` that it computes with, unpacked anew each time."""
        return self.quantizer.unpack(self.parts, self.compute_dtype)

    @torch.no_grad()
    def take(self, weight: Tensor) -> "QuantizedLinear":
        """Have another weight, ``[out, in]``."""
        for name, value in self.quantizer.pack(weight).items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        if torch.is_grad_enabled() and x.requires_grad:
            out = _Product.apply(x, self.quantizer, self.names, *self.parts.values())
            return out if self.bias is None else out + self.bias
        if torch.is_grad_enabled() and self.bias is not None and self.bias.requires_grad:
            return self.quantizer.linear(x, self.parts, None) + self.bias
        return self.quantizer.linear(x, self.parts, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Move the tensors that stand for the weight, but leave them their dtypes: ``model.bfloat16()`` means the
        weight as it is computed with."""
        parts = {name: self._parameters.pop(name) for name in self.names}
        super()._apply(fn, recurse)
        for name, part in parts.items():
            assert part is not None
            moved = fn(part.data)
            moved = moved if moved.dtype == part.dtype else part.data.to(moved.device)
            self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=moved.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"{super().extra_repr()}, {type(self.quantizer).__name__}"
