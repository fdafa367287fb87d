"""From config sections to models: what can be known without weights, and what can be checked early."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.config.choices import QUANTIZERS
from opensora.config.options import ModelOptions
from opensora.models.inspect import inspect
from opensora.models.kinds import kind_of, released_weights
from opensora.models.text.files import check_encoder, check_quantize
from opensora.registry import MODELS, build_module
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.weights import check_on_hub, is_costly, is_hub_path, resolve_path
from opensora.utils.weights_loading import Change, check_file

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
    section: ModelOptions,
    device: torch.device | str,
    dtype: torch.dtype,
    name: str = "model",
    change: Change | None = None,
) -> nn.Module:
    """The model of a config section, loaded, frozen and in eval mode.

    Without ``from_pretrained`` it starts from random weights, and the log says so.

    Args:
        section: says which.
        device: where its weights go.
        dtype: of its weights.
        name: of the section.
        change: what is done to every parameter when it is read; for models with quantised weights, which cannot be
            changed any more.
    """
    more = {"change": change} if change is not None else {}
    model = build_module(section, MODELS, device_map=device, torch_dtype=dtype, **more).eval().requires_grad_(False)
    if not section.from_pretrained and not released_weights(section) and count_parameters(model):
        logger.warning("%s: random weights (%s.from_pretrained is not set), so its output means nothing", name, name)
    return model


def check_weights(name: str, section: ModelOptions, model: Any = None) -> None:
    """See that the weights of a section are there, readable, and those of its model, without loading them.

    Only headers are read. The hub is asked about paths there; a model that is to have random weights passes.

    Args:
        name: of the section.
        section: says where the weights are.
        model: its model on the meta device, where that is at hand; else it is built.

    Raises:
        UserError: missing (with the command that downloads them), damaged, or of another model.
    """
    path = section.from_pretrained
    local = Path(path or "").expanduser()
    reads_text = section.type == "text_embedder"
    if reads_text and not path:
        raise UserError(f"{name}.from_pretrained is not set: give the folder of a text encoder")
    wanted = getattr(section, "quantize", None)
    if wanted is not None:
        QUANTIZERS.get(wanted).check(f"{name}.quantize={wanted}")
    if not path:
        return
    if local.is_file() if reads_text else (local / "config.json").is_file():
        held = inspect(local)
        if reads_text or held.model_type == "text_embedder":
            raise UserError(f"{name}.from_pretrained={path} holds {held}; {name} needs {_wanted(section)}")
    if reads_text:
        check_encoder(name, path, getattr(section, "max_length", None))
        check_quantize(name, path, getattr(section, "quantize", None))
    elif is_hub_path(path) and not local.exists():
        check_on_hub(path, section.cache_dir)
    else:
        found = resolve_path(path)
        if not is_costly(found):
            check_file(model or build_on_meta(section), found, section.cache_dir)


def _wanted(section: ModelOptions) -> str:
    kind = kind_of(MODELS.resolve(section.type))
    if kind is not None:
        return kind.name
    return "the folder of a text encoder" if section.type == "text_embedder" else f"weights for type={section.type!r}"


def check_all_weights(
    sections: Mapping[str, ModelOptions], models: Mapping[str, Any], **more: Callable[[], object]
) -> None:
    """`check_weights` of all models of a run, and further checks by name: what is wrong with any is told at once.

    Args:
        sections: of the models, by name.
        models: those that are at hand on the meta device.
        **more: further checks, each of which may raise a UserError.

    Raises:
        UserError: what is wrong with the only one, or with all.
    """
    checks: dict[str, Callable[[], object]] = {
        name: partial(check_weights, name, section, models.get(name)) for name, section in sections.items()
    }
    wrong: dict[str, str] = {}
    for name, check in {**checks, **more}.items():
        try:
            check()
        except UserError as error:
            wrong[name] = str(error)
    if len(wrong) == 1:
        raise UserError(*wrong.values())
    if wrong:
        told = "\n".join(f"{name}: {message}" for name, message in wrong.items())
        raise UserError(f"the weights of {', '.join(wrong)} cannot be used\n{told}")


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_capacity(model: nn.Module, device: torch.device, asked_for: str | None) -> None:
    """Refuse a model too large for a CPU, unless the CPU was asked for by name.

    Raises:
        UserError: says what to use instead.
    """
    parameters = count_parameters(model)
    if device.type == "cpu" and asked_for is None and parameters > MAX_CPU_PARAMETERS:
        raise UserError(
            f"no GPU found, and this config's model has {parameters / 1e9:.1f}B parameters; use "
            "a config of configs/diffusion/inference/demo/, which run on a CPU, or --device cpu to insist"
        )
