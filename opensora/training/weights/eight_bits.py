"""AdamW whose moments are kept in 8 bits (arXiv:2110.02861), by bitsandbytes, also where ranks hold shares of weights.

Blocks of 256 numbers share a scale. Of a parameter that is divided by rows (FSDP2), a rank keeps those of its rows;
they are the blocks of the whole one if 256 divides what a row has. Others (biases, norms, small layers) keep their
moments in fp32 then, so that a checkpoint is the same for any number of ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from opensora.utils.optional import import_bitsandbytes

LEAST_IN_8_BITS = 4096  # numbers of a parameter, below which its moments stay in fp32
BLOCK_IN_8_BITS = 256  # numbers that share a scale
STATE_IN_8_BITS = "state1"  # a name in the state of AdamW8bit that no other has
SCALES = ("absmax1", "absmax2")
MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # tables of the values that 8 bits stand for


def is_kept_in_8_bits(shape: Sequence[int], divided: bool) -> bool:
    """Whether the moments of a parameter take 8 bits."""
    count = torch.Size(shape).numel()
    by_row = len(shape) > 1 and count // shape[0] % BLOCK_IN_8_BITS == 0
    return count >= LEAST_IN_8_BITS and (by_row or not divided)


def adamw_in_8_bits(parameters: Sequence[Any], options: Mapping[str, Any]) -> Optimizer:
    """The optimizer over whole parameters, or over divided ones."""
    library = import_bitsandbytes()
    base: Any = library.optim.AdamW8bit

    class AdamW8bit(base):
        """bitsandbytes' optimizer. Its state is given as tensors by name, as checkpoints write it; the library hides
        them in a dict for FSDP."""

        flat_entries = SCALES  # one number for a block: of divided parameters [rows, blocks of a row]
        shared_entries = tuple(MAPS)

        def state_dict(self) -> dict[str, Any]:
            return Optimizer.state_dict(self)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """One update; unlike the library's, it does not wait for a GPU after every parameter."""
            loss = closure() if closure is not None else None
            for number, group in enumerate(self.param_groups):
                for place, p in enumerate(group["params"]):
                    if p.grad is None:
                        continue
                    if not self.state[p]:
                        self.init_state(group, p, number, place)
                    self.update_step(group, p, number, place)
            return loss

        def init_state(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            if not isinstance(p, DTensor):
                super().init_state(group, p, gindex, pindex)
                return
            own, state = p.to_local(), self.state[p]
            state["step"] = 0
            in_8_bits = is_kept_in_8_bits(p.shape, divided=True)
            for moment in ("1", "2"):
                zeros = torch.zeros_like(own, dtype=torch.uint8 if in_8_bits else torch.float32)
                state[f"state{moment}"] = divided_like(p, zeros)
                if in_8_bits:
                    blocks = own.numel() // own.shape[0] // BLOCK_IN_8_BITS if own.shape[0] else 0
                    state[f"absmax{moment}"] = divided_like(p, own.new_zeros((own.shape[0], blocks)))
            self._add_maps(p)

        def _add_maps(self, p: Any) -> None:
            state = self.state[p]
            if state and state[STATE_IN_8_BITS].dtype == torch.uint8:
                for name, kind in MAPS.items():
                    self.name2qmap[kind] = state[name] = self.name2qmap[kind].to(p.device)

        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            if not isinstance(p, DTensor):
                super().update_step(group, p, gindex, pindex)
                return
            own, grad, state = p.to_local().detach(), p.grad, self.state[p]
            if not own.numel():  # more ranks than rows
                state["step"] += 1
                return
            own.grad = grad.to_local() if isinstance(grad, DTensor) else grad
            plain = {key: x.to_local() if isinstance(x, DTensor) else x for key, x in state.items()}
            self.state[own] = {key: x.view(-1) if key in SCALES else x for key, x in plain.items()}
            super().update_step(group, own, gindex, pindex)
            state["step"] = self.state.pop(own)["step"]

        def from_whole(self, p: Any, values: Mapping[str, Any]) -> dict[str, Any]:
            """Saved state of a whole parameter in the form that it has here: in 8 bits or not, scales by rows where
            they are divided, without tables."""
            divided, found = isinstance(p, DTensor), {key: values[key] for key in values if key not in MAPS}
            wanted = is_kept_in_8_bits(p.shape, divided)
            if wanted != (values[STATE_IN_8_BITS].dtype == torch.uint8):
                for moment, kind in zip("12", MAPS.values()):
                    found |= self._packed(found, moment, kind) if wanted else self._unpacked(found, moment, kind)
            if divided and wanted:
                found |= {key: found[key].view(p.shape[0], -1) for key in SCALES}
            return {key: value for key, value in found.items() if value is not None}

        def _packed(self, values: Mapping[str, Any], moment: str, kind: str) -> dict[str, Any]:
            code, value = self.name2qmap[kind].cpu(), values[f"state{moment}"].cpu().float()
            packed, state = library.functional.quantize_blockwise(value, code=code, blocksize=BLOCK_IN_8_BITS)
            return {f"state{moment}": packed.view(value.shape), f"absmax{moment}": state.absmax}

        def _unpacked(self, values: Mapping[str, Any], moment: str, kind: str) -> dict[str, Any]:
            packed, scales = values[f"state{moment}"].cpu(), values[f"absmax{moment}"].cpu().view(-1)
            code = self.name2qmap[kind].cpu()
            value = library.functional.dequantize_blockwise(packed, absmax=scales, code=code, blocksize=BLOCK_IN_8_BITS)
            return {f"state{moment}": value.view(packed.shape), f"absmax{moment}": None}

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            states = {
                index: values if isinstance(parameters[index], DTensor) else self.from_whole(parameters[index], values)
                for index, values in state_dict["state"].items()
            }
            super().load_state_dict({**state_dict, "state": states}, move_to_device)
            for p in self.state:
                self._add_maps(p)

    return AdamW8bit(parameters, **options)


def divided_like(p: DTensor, own: Tensor) -> DTensor:
    """What a rank holds of something with a parameter's rows, as part of the whole."""
    shape = torch.Size((p.shape[0], *own.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)
