"""How a pipeline is called: diffusers' names for its arguments, and the bar that shows its steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora.config.options import MAX_SEED
from opensora.diffusion.conditions import takes_references
from opensora.diffusion.solvers import StepCallback
from opensora.utils.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator]
"""One for all prompts, or one each."""
SAMPLING = {"num_inference_steps": "num_steps", "guidance_scale": "guidance"}  # diffusers' name -> ours
MOST_TEXTS = 1024  # of a call, as of a command line's batch
SHOWN = 200  # letters of a wrong value
PICTURE = "i2v_head"  # what ``image`` fixes where nothing else is said


def one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    """The value of an argument that has two names; None where neither is given.

    Raises:
        UserError: both are.
    """
    if value is not None and other is not None:
        raise UserError(f"{name} and {alias} are the same argument: give one of them")
    return value if other is None else other


def plain(value: Any) -> Any:
    """A number, or a list of them, out of NumPy or torch; anything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def texts_of(value: Any, name: str = "prompt") -> list[str]:
    """One text, or several, as a list.

    Raises:
        UserError: none, more than one batch has room for, or something that is no text.
    """
    in_order = isinstance(value, Iterable) and not isinstance(value, Mapping | set | frozenset)
    texts = [value] if isinstance(value, str) else list(islice(value, MOST_TEXTS + 1)) if in_order else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: give a text or a list of texts, not {repr(value)[:SHOWN]}")
    if len(texts) > MOST_TEXTS:
        raise UserError(f"{name}: more than {MOST_TEXTS} texts; a call makes one batch, so give them to several calls")
    return texts


def per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """One value for all prompts, or one each, as a list."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{len(value)} {name} for {count} prompts")
    return list(value)


def with_aliases(sampling: Mapping[str, Any], **aliases: Any) -> dict[str, Any]:
    """Sampling options of a call with those that came under diffusers' names.

    Raises:
        UserError: one came under both.
    """
    given = {alias: value for alias, value in aliases.items() if value is not None}
    return {
        **sampling,
        **{
            SAMPLING[each]: one_of(SAMPLING[each], sampling.get(SAMPLING[each]), each, value)
            for each, value in given.items()
        },
    }


def condition_of(cond_type: str | None, configured: str, image: Any) -> str:
    """What the references of a call fix: as said, as configured, or the first frame where an ``image`` is given."""
    if cond_type is None and image is not None and not takes_references(configured):
        return PICTURE
    return cond_type or configured


def seeds_of(generators: Generators | None) -> int | list[int] | None:
    """Seeds of generators: of a new one the seed that it was made with, later what it draws next.

    A generator moves on, so that it gives another video with each call, as diffusers' pipelines do.
    """
    if generators is None:
        return None
    if isinstance(generators, torch.Generator) or not isinstance(generators, Iterable):
        return _seed_of(generators)
    return [_seed_of(each) for each in generators]


def _seed_of(generator: Any) -> int:
    if not isinstance(generator, torch.Generator):
        raise UserError(f"generator: give a torch.Generator or a list of them, not {generator!r}")
    seed = generator.initial_seed()
    new = torch.Generator(generator.device).manual_seed(seed)
    is_new = torch.equal(new.get_state(), generator.get_state())
    drawn = torch.randint(MAX_SEED, (), generator=generator, device=generator.device)
    return seed % (MAX_SEED + 1) if is_new else int(drawn)


@contextmanager
def shown_steps(wanted: bool | None, on_step: StepCallback | None) -> Iterator[StepCallback | None]:
    """``on_step`` with a bar of the steps.

    Args:
        wanted: show the bar; None shows it in a terminal.
        on_step: called besides.
    """
    bar = tqdm(unit="step", leave=False, disable=None if wanted is None else not wanted)

    def shown(step: int, total: int, latents: Tensor) -> None:
        bar.total = total
        bar.update(step - bar.n)
        if on_step is not None:
            on_step(step, total, latents)

    with bar:
        yield on_step if bar.disable else shown
