"""A whole pipeline as a folder: weights, config and model card, which opensora and diffusers load.

The folder is laid out as diffusers has it (``model_index.json``, a sub-folder for each part), so that
``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`` loads it too, by
:mod:`opensora.diffusion.for_diffusers`; ``config.json`` is what opensora goes by.
"""

import glob
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from opensora.acceleration.devices import dtype_name
from opensora.config.options import ModelOptions
from opensora.diffusion.lora import LoraLinear
from opensora.diffusion.model_card import pipeline_card
from opensora.diffusion.stages import Stages
from opensora.models.quantization.kinds import METADATA as QUANTIZED
from opensora.models.quantization.loading import kind_of_module
from opensora.models.text import HFEmbedder
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from opensora.utils.files import (
    check_new,
    discard_folder,
    naming,
    put_in_place,
    remove_unfinished_folders,
    temporary_path,
    write_json,
    write_text,
)
from opensora.utils.weights import WEIGHT_SUFFIXES
from opensora.utils.weights_writing import save_safetensors

# section of a config -> folder of its part, as diffusers calls it
FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "model": "transformer",
        "ae": "vae",
        "t5": "text_encoder",
        "clip": "text_encoder_2",
        "img_flux": "image_transformer",
        "img_flux_ae": "image_vae",
    }
)
WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
CONFIG, INDEX = "config.json", "model_index.json"
CODE, PART_CODE = "pipeline", "opensora_part"  # files of the folder that diffusers runs
PIPELINE_CLASS, PART_CLASS = "OpenSoraPipeline", "Part"
TOKENIZERS: Mapping[str, str] = MappingProxyType({"t5": "T5Tokenizer", "clip": "CLIPTokenizer"})
DIFFUSERS = "0.32.0"  # the first with components that bring their code
# of a config, what belongs to a model and not to a run or a machine
KEPT = ("cond_type", "dtype", "fps_save", "img_resolution", "imports", "motion_score", "patch_size", "use_t2i2v")
OF_THIS_MACHINE = ("cache_dir", "from_pretrained")


def save_pipeline(
    pipe: Stages, folder: str | Path, name: str | None = None, license: str | None = None, overwrite: bool = False
) -> Path:
    """Write a pipeline as a folder, whole or not at all.

    Args:
        pipe: loaded; adapters that are merged are in the weights then.
        folder: to write.
        name: how the model card calls it: an id, or by default the folder.
        license: identifier of the weights' licence for the card (``apache-2.0``); None leaves it open.
        overwrite: replace a folder that holds a pipeline.

    Returns:
        The folder.

    Raises:
        UserError: the folder has something, or the pipeline is divided over ranks or has adapters beside its weights.
    """
    check_new(folder)
    folder = Path(folder).expanduser()
    _check_whole(pipe)
    check_place(folder, overwrite)
    sections = {key: getattr(pipe.cfg, key) for key in FOLDERS if key in pipe.models}
    with claimed(folder.absolute(), is_folder=False, advice="name another folder, or wait for it"):
        check_place(folder, overwrite)  # another process may have put it there meanwhile
        remove_unfinished_folders(folder.absolute().parent, glob.escape(folder.absolute().name))
        writing = temporary_path(folder.absolute(), "writing")
        try:
            for key in sections:
                _save_part(pipe, key, writing)
            config = _config(pipe, sections)
            write_json(config, writing / CONFIG)
            write_json(_index(sections), writing / INDEX)
            write_text(_code(PIPELINE_CLASS), writing / f"{CODE}.py")
            parameters = {FOLDERS[key]: sum(each.numel() for each in pipe.models[key].parameters()) for key in sections}
            write_text(pipeline_card(config, parameters, name or folder.name, license), writing / "README.md")
            put_in_place(writing, folder)
        finally:
            discard_folder(writing)
    return folder


def _check_whole(pipe: Stages) -> None:
    """Raise a UserError for a pipeline of which this process does not have all, or whose model has adapters beside."""
    if pipe.parallel.sample.size > 1:
        raise UserError("save_pretrained: the models are divided over ranks; load the pipeline in one process")
    for key, model in pipe.models.items():
        if any(isinstance(module, LoraLinear) for module in model.modules()):
            raise UserError(
                f"save_pretrained: {key} has adapters beside its weights; take them off (unload_lora), or load it with "
                "merge_lora=True, which adds them to the weights"
            )


def check_place(folder: Path, overwrite: bool) -> None:
    """Raise a UserError for a place that has something else than a pipeline, or a pipeline without ``overwrite``."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} exists and holds no pipeline; name another folder")
    if not overwrite:
        raise UserError(f"{folder} holds a pipeline; name another folder, or give overwrite=True")


def _save_part(pipe: Stages, key: str, folder: Path) -> None:
    """Write the weights of one part, the code that diffusers loads it by, and the tokenizer of a text encoder."""
    model, part = pipe.models[key], folder / FOLDERS[key]
    write_text(_code(PART_CLASS), part / f"{PART_CODE}.py")
    kind = kind_of_module(model)
    metadata = {} if kind is None else {QUANTIZED: kind}
    if isinstance(model, HFEmbedder):
        save_safetensors(model.model.state_dict(), part / TEXT_WEIGHTS, metadata)
        with naming(part):
            model.model.config.save_pretrained(part)
        _save_tokenizer(model, folder / FOLDERS[key].replace("text_encoder", "tokenizer"))
        return
    metadata |= _layouts(model)
    distilled = getattr(pipe, "distilled", None)
    if key == "model" and distilled is not None:
        metadata |= distilled.metadata()
    save_safetensors(model.state_dict(), part / WEIGHTS, metadata)


def _layouts(model: nn.Module) -> dict[str, str]:
    layouts = getattr(model, "file_metadata", None)
    return dict(layouts()) if callable(layouts) else {}


def _save_tokenizer(model: HFEmbedder, folder: Path) -> None:
    """The files of a tokenizer as they are; of one from a hub, as transformers writes it."""
    if model.tokenizer_files is None:
        with naming(folder):
            model.tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    for file in sorted(model.tokenizer_files.iterdir()):
        weights = file.name.endswith((*WEIGHT_SUFFIXES, ".index.json", ".py"))
        if file.is_file() and not weights and file.name not in (CONFIG, "generation_config.json", "README.md"):
            shutil.copyfile(file, folder / file.name)


def _config(pipe: Stages, sections: Mapping[str, ModelOptions]) -> dict[str, Any]:
    """Content of ``config.json``: the pipeline's config without what belongs to a run or a machine."""
    given = pipe.cfg.to_dict()
    config = {key: given[key] for key in KEPT if given.get(key) is not None}
    config["dtype"] = dtype_name(pipe.dtype)
    config["sampling_option"] = (pipe.plain or pipe.cfg.sampling_option).to_dict()
    for key, section in sections.items():
        content = {name: value for name, value in section.to_dict().items() if name not in OF_THIS_MACHINE}
        is_text = isinstance(pipe.models[key], HFEmbedder)
        path = FOLDERS[key] if is_text else f"{FOLDERS[key]}/{WEIGHTS}"
        config[key] = {"type": section.type, **content, "from_pretrained": path}
    return config


def _index(sections: Collection[str]) -> dict[str, Any]:
    """Content of ``model_index.json``, by which diffusers loads."""
    index: dict[str, Any] = {"_class_name": [CODE, PIPELINE_CLASS], "_diffusers_version": DIFFUSERS}
    for key, folder in FOLDERS.items():
        index[folder] = [PART_CODE, PART_CLASS] if key in sections else [None, None]
    for key, tokenizer in TOKENIZERS.items():
        index[FOLDERS[key].replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
    return index


def _code(name: str) -> str:
    """A file by which diffusers finds a class of opensora."""
    return (
        '"""Lets diffusers load this pipeline; needs opensora to be installed."""\n\n'
        f"from opensora.diffusion.for_diffusers import {name} as {name}\n"
    )
