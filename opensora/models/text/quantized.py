"""T5 with quantised weights, read from its files a tensor at a time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.models.quantization.loading import Quantization
from opensora.models.text.files import WEIGHT_NAMES, weight_files
from opensora.utils.errors import UserError, shorten
from opensora.utils.weights import WeightFiles, check_finite
from opensora.utils.weights_loading import fill

SHARED, EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"  # one tensor under two names


def load_t5(folder: Path, quantization: Quantization, dtype: torch.dtype) -> Any:
    """The T5 encoder of a folder that :func:`opensora.models.text.files.check_encoder` has seen, on the CPU.

    Raises:
        UserError: see :meth:`Quantization.kind`; or weights that are not finite, or not all there.
    """
    from transformers import T5Config, T5EncoderModel

    weights = stored_weights(folder)
    with torch.device("meta"):
        model: Any = T5EncoderModel(T5Config.from_pretrained(folder))
    plain = {*model.state_dict()}
    pack = quantization.replace(model, weights, dtype)
    parts = quantization.stored_parts(weights)
    own = {*model.state_dict()}
    state: dict[str, Tensor] = {}
    for key, tensor in weights.tensors("cpu", dtype, skip=weights.shapes.keys() - plain - own, as_stored=parts):
        check_finite(key, tensor, weights.path)
        state |= pack(key, tensor)
        del tensor  # before the next one is read
    shared = state.get(SHARED, state.get(EMBEDDED))
    lost = sorted(own - state.keys() - {SHARED, EMBEDDED})
    if lost or shared is None:
        raise UserError(f"Cannot load the text encoder {folder}: its weights lack {shorten(lost or [SHARED])}")
    fill(model, {**state, SHARED: shared, EMBEDDED: shared}, "cpu")
    model.tie_weights()
    return model


def stored_weights(folder: Path) -> WeightFiles:
    """The weights of a folder of Hugging Face's, whatever it takes to see what is in them."""
    found = weight_files(folder)
    if found is not None:
        return found
    file = next(path for name in WEIGHT_NAMES if (path := folder / name).is_file())
    return WeightFiles(file, [file])
