"""Prompts: what is appended to them, and tables (or a single flag) of them read into requests."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config.commands import InferenceOptions
from opensora.config.options import DatasetOptions
from opensora.datasets.table import row_name
from opensora.diffusion.conditions import get_condition, get_spans, takes_references
from opensora.diffusion.free import Region
from opensora.diffusion.plan import starts_from_picture
from opensora.diffusion.references import locate_references, split_references, warn_of_unused
from opensora.diffusion.wording import check_fps, check_motion_score, check_prompt, check_seed, final_text, read_seed
from opensora.registry import DATASETS, build_module
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger
from opensora.utils.paths import expand_home

logger = get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """One prompt to make videos of.

    Attributes:
        text: prompt as the user wrote it.
        index: row in its table, from 0.
        where: how to name it to the user.
        name: file name from the table, None to number it.
        ref: references as the user wrote them.
        refs: the same as local files, and behind them the mask.
        cond_type: condition; ``t2v`` where there are no references.
        neg: negative prompt.
        fps: frame rate; also appended to the prompt.
        motion_score: motion score appended to the prompt, None for none.
        seed: seed of the noise of the first video, None to draw one.
        refined: prompt as a language model wrote it out, if asked to, or as the table has it.
        image_text: the same for the picture made first (``use_t2i2v``).
        next_texts: prompts of the windows after the first of a long video; the last one stays.
        mask: of a region, as the user wrote it.
    """

    text: str
    index: int
    where: str
    name: str | None
    ref: str
    refs: tuple[str, ...]
    cond_type: str
    neg: str
    fps: float
    motion_score: str | None
    seed: int | None
    refined: str | None = None
    image_text: str | None = None
    next_texts: tuple[str, ...] = ()
    mask: str = ""

    @property
    def final_text(self) -> str:
        """Prompt as the text encoders get it."""
        return final_text(self.refined or self.text, self.fps, self.motion_score)

    @property
    def next_final_texts(self) -> list[str]:
        """Prompts of the windows after the first as the text encoders get them."""
        return [final_text(text, self.fps, self.motion_score) for text in self.next_texts]

    @property
    def picture_text(self) -> str:
        """Prompt of the picture made first."""
        return self.image_text or self.text


Row = Mapping[str, Any]


def read_requests(
    cfg: InferenceOptions, downloads: Path, amend: Callable[[Row, int], Row] | None = None
) -> list[Request]:
    """Requests of a run: the single ``prompt`` if there is one, else the chosen rows of ``dataset``.

    Args:
        cfg: resolved config.
        downloads: folder for references from the web.
        amend: from a row of the table and its number to the row to go by.

    Raises:
        UserError: no prompts, a table without ``text`` or with an empty one, a value of the wrong kind.
    """
    if cfg.prompt is not None:
        if not cfg.prompt.strip():
            raise UserError("--prompt is empty")
        rows = {"text": cfg.prompt, "ref": cfg.ref or "", "mask": cfg.mask or ""}
        rows |= {f"text_{number}": text for number, text in enumerate(cfg.next_prompts or (), 2)}
        return [_request(cfg, rows, 0, "--prompt", None, downloads)]
    section = cfg.dataset or DatasetOptions(type="text")
    if section.type == "text" and not section.data_path:
        raise UserError('nothing to make: give --prompt "..." or --dataset.data-path prompts.csv')
    table = build_module(section, DATASETS)
    path = table.data_path
    start = cfg.start_index
    end = cfg.end_index
    if end is None and cfg.num_samples is not None:
        end = start + cfg.num_samples
    chosen = range(len(table))[slice(start, end)]
    if not chosen:
        raise UserError(f"{path}: no rows from start_index={start} to end_index={end}; the table has {len(table)}")
    requests = []
    for index in chosen:
        where = row_name(path, index)
        row = table[index] if amend is None else amend(table[index], index)
        requests.append(_request(cfg, row, index, where, expand_home(path).parent, downloads))
    return requests


def _request(
    cfg: InferenceOptions, row: Mapping[str, Any], index: int, where: str, beside: Path | None, downloads: Path
) -> Request:
    def cell(name: str) -> str:
        return str(row.get(name, "")).strip()

    if not cell("text"):
        raise UserError(f"{where}: column 'text' is empty")
    cond_type = cell("cond_type") or cfg.cond_type
    try:
        cond_type = starts_from_picture(cond_type) if cfg.use_t2i2v else cond_type
        is_given = takes_references(cond_type)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if cell("ref") and not is_given:
        given = "--ref" if where == "--prompt" else f"{where}: ref"
        raise UserError(f"{given} is given but cond_type is t2v; --cond_type i2v_head starts from a picture")
    mask = _mask(cfg, cell("mask"), cond_type, where)
    if is_given and not cell("ref") and not cfg.use_t2i2v:
        logger.warning("%s: no reference for cond_type %s, making a t2v video", where, cond_type)
        cond_type, mask = "t2v", ""
    if is_given and not cell("ref") and cfg.use_t2i2v and not get_spans(cond_type):
        raise UserError(
            f"{where}: use_t2i2v makes a picture to start from, which cond_type {cond_type} has no place for"
        )
    if is_given and cell("ref") and not split_references(cell("ref")):
        raise UserError(f"{where_of_ref(where)}: ref {cell('ref')!r} names no file")
    try:
        refs = locate_references(cell("ref"), downloads, beside) if is_given else []
        refs += locate_references(mask, downloads, beside)
    except UserError as error:
        raise UserError(f"{where_of_ref(where)}: {error}") from None
    warn_of_unused(refs, cond_type, where_of_ref(where))
    fps = check_fps(_number(cell("fps") or cfg.fps_save, "fps", where), where)
    seed = read_seed(cell("seed"), where) if cell("seed") else cfg.sampling_option.seed
    return Request(
        text=check_prompt(cell("text"), where),
        index=index,
        where=where,
        name=cell("name") or None,
        ref=cell("ref") if refs else "",
        refs=tuple(refs),
        cond_type=cond_type,
        neg=check_prompt(cell("neg"), f"{where}: neg"),
        fps=fps,
        motion_score=check_motion_score(cell("motion_score") or cfg.motion_score, where),
        seed=None if seed is None else check_seed(seed, where),
        refined=check_prompt(cell("refined"), f"{where}: refined") or None,
        image_text=check_prompt(cell("image_text"), f"{where}: image_text") or None,
        next_texts=_next_texts(row, cell, where),
        mask=mask,
    )


def _mask(cfg: InferenceOptions, own: str, cond_type: str, where: str) -> str:
    """The mask of a request: the row's, or that of the command line.

    Raises:
        UserError: one where none is taken, or none where one is needed.
    """
    takes_mask, name = (
        isinstance(get_condition(cond_type), Region),
        "--mask" if where == "--prompt" else f"{where}: mask",
    )
    if own and not takes_mask:
        raise UserError(f"{name} is given but cond_type is {cond_type}; --cond_type region keeps what is white in it")
    mask = own or cfg.mask or ""
    if takes_mask and not mask:
        raise UserError(f"{name} is missing: cond_type region wants what is white where the reference is kept")
    return mask if takes_mask else ""


def _next_texts(row: Row, cell: Callable[[str], str], where: str) -> tuple[str, ...]:
    """Columns ``text_2``, ``text_3``, ..., of which those at the end may be empty (the last text stays then).

    Raises:
        UserError: one after an empty one.
    """
    given = sorted(int(name[5:]) for name in row if re.fullmatch(r"text_([2-9]|[1-9]\d+)", str(name)) and cell(name))
    if given != list(range(2, len(given) + 2)):
        raise UserError(f"{where}: text_{given[-1]} is given, but not all texts before it (text_2, text_3, ...)")
    return tuple(check_prompt(cell(f"text_{number}"), f"{where}: text_{number}") for number in given)


def where_of_ref(where: str) -> str:
    """How to name a request's references to the user: their own flag, or the row."""
    return "--ref" if where == "--prompt" else where


def _number(value: Any, name: str, where: str) -> float:
    try:
        return int(value) if str(value).isdecimal() else float(value)  # seeds have more digits than a float
    except ValueError:
        raise UserError(f"{where}: {name} {value!r} is not a number") from None
