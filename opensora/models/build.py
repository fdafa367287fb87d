"""From config sections to models: what can be known without weights, and what can be checked early."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from opensora.config.options import ModelOptions
from opensora.models.kinds import released_weights
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import PICKLE_SUFFIXES, check_on_hub, is_hub_path, open_weights, resolve_path

logger = get_logger(__name__)


# Beyond this a CPU would take hours for one video.
MAX_CPU_PARAMETERS = 2e9


def build_on_meta(section: ModelOptions) -> nn.Module:
    """The model of a config section without weights or memory, to ask it for sizes and parameter counts.

    Raises:
        UserError: unknown type or argument, or sizes that do not fit together.
    """
    with torch.device("meta"):
        return build_module(replace(section, from_pretrained=None), MODELS, device_map="meta")


def build_ready(
    section: ModelOptions, device: torch.device | str, dtype: torch.dtype, name: str = "model"
) -> nn.Module:
    """The model of a config section, loaded, frozen and in eval mode.

    Without ``from_pretrained`` it starts from random weights, and the log says so.
    """
    model = build_module(section, MODELS, device_map=device, torch_dtype=dtype).eval().requires_grad_(False)
    if not section.from_pretrained and not released_weights(section) and count_parameters(model):
        logger.warning("%s: random weights (%s.from_pretrained is not set), so its output means nothing", name, name)
    return model


def check_weights(name: str, section: ModelOptions) -> None:
    """See that the weights of a section are there and readable, without loading them.

    The hub is asked about paths there; a model that is to have random weights passes.

    Raises:
        UserError: missing (with the command that downloads them) or damaged.
    """
    path = section.from_pretrained
    if section.type == "text_embedder":
        from opensora.models.text.embedder import encoder_kind

        if not path:
            raise UserError(f"{name}.from_pretrained is not set: give the folder of a text encoder")
        encoder_kind(str(path))
    elif path and is_hub_path(path) and not Path(path).expanduser().exists():
        check_on_hub(path, section.cache_dir)
    elif path:
        found = resolve_path(path)
        if found.suffix not in PICKLE_SUFFIXES:  # those can only be checked by reading them whole
            open_weights(found)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_capacity(model: nn.Module, device: torch.device, asked_for: str | None) -> None:
    """Refuse a model that is hopeless without a GPU, unless the CPU was asked for by name.

    Raises:
        UserError: says what to use instead.
    """
    parameters = count_parameters(model)
    if device.type == "cpu" and asked_for is None and parameters > MAX_CPU_PARAMETERS:
        raise UserError(
            f"no GPU found, and this config's model has {parameters / 1e9:.1f}B parameters; use "
            "a config of configs/diffusion/inference/demo/, which run on a CPU, or --device cpu to insist"
        )
