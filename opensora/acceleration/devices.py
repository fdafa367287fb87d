"""Device and precision of a process, from the names that a config gives them."""

import torch

from opensora.config.commands import DType
from opensora.utils.errors import UserError

DTYPES: dict[DType, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}


KNOWN = ("cpu", "cuda")  # types of devices; AMD's are cuda as well


def torch_dtype(name: str) -> torch.dtype:
    """Torch dtype of a config's ``dtype``.

    Raises:
        UserError: unknown name; lists the valid ones.
    """
    for known, dtype in DTYPES.items():
        if name == known:
            return dtype
    raise UserError(f"unknown dtype {name!r}; valid: {', '.join(DTYPES)}")


def dtype_name(dtype: torch.dtype) -> DType:
    """A config's name of a torch dtype.

    Raises:
        UserError: no config has it; lists the valid ones.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise UserError(f"dtype {dtype} is none that models work in; valid: {', '.join(DTYPES)}")


def pick_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """Device of this process.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes CUDA where there is one.
        local_rank: number of this process on its machine; chooses its GPU where ``name`` does not.

    Raises:
        UserError: a CUDA device that is not there, or an unknown name.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in KNOWN:
            raise RuntimeError("nothing is computed there")
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; valid: cpu, cuda, cuda:N") from error
    if device.type != "cuda":
        return torch.device(device.type)  # of which there is one
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else local_rank
    if index >= count:
        raise UserError(
            f"device {name or 'cuda'}: needs GPU {index}, found {count} GPUs; use --device cpu or fewer ranks"
        )
    return torch.device("cuda", index)
