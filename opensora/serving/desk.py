"""Requests to sampling runs, by the plan and the checks of the command line, before anything is loaded.

The server asks it whether a request can be made, the worker how: both get the same answer.
"""

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from opensora.config.commands import ServeOptions
from opensora.config.options import SamplingOption
from opensora.diffusion.conditions import get_condition, get_spans, takes_references
from opensora.diffusion.free import Anywhere, Region
from opensora.diffusion.lora import read_loras
from opensora.diffusion.plan import SamplePlan, make_plan, starts_from_picture
from opensora.diffusion.prepared import PreparedRun, check_parallelism, check_takes_references
from opensora.diffusion.windows import is_long
from opensora.diffusion.wording import check_prompt
from opensora.generation.jobs import Job as Sample
from opensora.generation.refine import make_asker, wants_language_model
from opensora.generation.requests import Request, read_requests
from opensora.generation.run import check_requests
from opensora.serving.examples import example_texts
from opensora.serving.jobs import Job
from opensora.serving.request import MOST_SEVERAL, SEVERAL, BadField, GenerationRequest
from opensora.utils.errors import UserError
from opensora.utils.paths import is_folder, split_place

OTHER_NAMES = ("opensora", "sora-2", "sora-2-pro")  # what clients call the one model as well
FIRST, LAST, MASK = "first", "last", "mask"  # uploads of a job
OTHERS = tuple(f"reference_{number}" for number in range(MOST_SEVERAL))
GIVEN = (FIRST, LAST, *OTHERS)  # in the order of references
WORK_FACTOR = 10  # a request may be so many times as much work as the config's own sample


class UnknownModel(BadField):
    """A request for another model than the one that is served."""


@dataclass(frozen=True)
class Prepared:
    """A request that can be made.

    Attributes:
        cfg: the server's config with what the request replaces.
        request: as the command line has it.
        plan: sizes and schedule.
        seed: of the noise.
        lora: adapter as ``PATH@strength``, or None.
    """

    cfg: ServeOptions
    request: Request
    plan: SamplePlan
    seed: int
    lora: str | None

    @property
    def shape(self) -> str:
        """Prepared requests of equal shape may be made in one batch."""
        option = dataclasses.replace(self.cfg.sampling_option, seed=None)
        kept = (option.to_dict(), self.plan.cond_type, bool(self.request.refs), self.lora)
        return json.dumps(kept, sort_keys=True, default=str)

    @property
    def facts(self) -> dict[str, Any]:
        """What was settled, for clients."""
        frames = self.plan.kept_frames()
        return {
            "width": self.plan.width,
            "height": self.plan.height,
            "num_frames": frames.stop - frames.start,
            "fps": self.request.fps,
            "num_inference_steps": self.plan.num_steps,
            "guidance_scale": self.cfg.sampling_option.guidance,
            "seed": self.seed,
            "cond_type": self.request.cond_type,
        }

    def sample(self, stem: Path) -> Sample:
        """As the command line's job, to be written to a file of this name."""
        return Sample(self.request, 0, self.seed, stem)


class Desk:
    """Checks requests against a config.

    Args:
        cfg: of the server.
        device: where the worker works.
        environment: where the key of a language model may stand.

    Raises:
        UserError: the config cannot be served; see :class:`opensora.diffusion.prepared.PreparedRun`.
    """

    def __init__(self, cfg: ServeOptions, device: torch.device, environment: Mapping[str, str]) -> None:
        self.cfg, self.environment = cfg, environment
        self.run = PreparedRun.of(cfg, device)
        check_parallelism(cfg, self.run.models["model"], cfg.worker_processes)
        if cfg.refine_prompt or cfg.motion_score == "dynamic":
            make_asker(cfg, environment)
        self._lora_files: dict[tuple[str, float], float] = {}

    @property
    def settings(self) -> ServeOptions:
        """The config as the model asks for it, if that is distilled; requests replace what it says."""
        return cast(ServeOptions, self.run.cfg)

    def plan(self, option: SamplingOption) -> SamplePlan:
        """A video from text alone.

        Raises:
            UserError: sizes or lengths that cannot be.
        """
        run = self.run
        return make_plan(option, run.plan.spec, run.cfg.patch_size, "t2v", distilled=run.distilled)

    @cached_property
    def can_refine(self) -> bool:
        """Whether a language model is at hand."""
        try:
            make_asker(self.cfg, self.environment)
        except UserError:
            return False
        return True

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.cfg.model_name or Path(self.cfg.config_path).stem

    @property
    def takes_references(self) -> bool:
        """Whether the model has an input for pictures."""
        try:
            check_takes_references(self.run.models["model"], "i2v_head")
        except UserError:
            return False
        return True

    @property
    def loras(self) -> list[str]:
        """Names of the adapters that requests may ask for."""
        folder = Path(self.cfg.lora_dir).expanduser() if self.cfg.lora_dir else None
        if folder is None or not folder.is_dir():
            return []
        found = (path for path in folder.iterdir() if not path.name.startswith("."))
        return sorted(path.name for path in found if path.suffix == ".safetensors" or path.is_dir())

    @cached_property
    def most_work(self) -> float:
        """Pixels x frames x steps that a request may ask for."""
        return self.cfg.max_work or WORK_FACTOR * work_of(self.run.plan)

    def prepare(self, asked: GenerationRequest, uploads: Mapping[str, Path], seed: int | None = None) -> Prepared:
        """What a request makes.

        Args:
            asked: the request.
            uploads: its pictures and clips, ``first``, ``last``, ``mask`` and ``reference_0``, ...
            seed: of the noise where the request has none; None draws one.

        Raises:
            UserError: it cannot be made; says why, as the command line does.
        """
        self._check_limits(asked)
        cfg = asked.settings(self.settings, self.run.plan.spec)
        cond_type = self._cond_type(asked, uploads)
        plan = self.plan(cfg.sampling_option)
        if work_of(plan) > self.most_work:  # before references are read
            raise UserError(self._too_much(plan))
        if asked.next_prompts and not is_long(cfg.sampling_option):
            raise BadField(
                "next_prompts",
                f"next_prompts are of further windows, and num_frames={plan.length} is made at once "
                f"(window={cfg.sampling_option.window}): ask for more frames, or leave them out",
            )
        refs = self._placed([str(uploads[name]) for name in GIVEN if name in uploads], asked, cond_type)
        mask = str(uploads[MASK]) if MASK in uploads else None
        cfg = dataclasses.replace(cfg, cond_type=cond_type, ref=";".join(refs) or None, mask=mask)
        (request,) = read_requests(cfg, Path())
        request = dataclasses.replace(request, where="prompt", neg=check_prompt(asked.negative_prompt, "neg"))
        lora = self._lora(asked)
        run = dataclasses.replace(self.run, cfg=cfg)
        check_requests(run, [request])
        if wants_language_model(cfg, [request]):
            make_asker(cfg, self.environment)
        (plan,) = run.plans([_planned(cfg, request)])
        drawn = random.SystemRandom().getrandbits(32) if seed is None else seed
        return Prepared(cfg, request, plan, drawn if request.seed is None else request.seed, lora)

    def prepared(self, job: Job, folder: Path) -> Prepared:
        """What a job makes, as it was settled when it came.

        Raises:
            UserError: what could be made then cannot be made now (an adapter has gone).
        """
        fields = dict(job.request)
        uploads = {name: folder / name for name in fields.pop("uploads", ())}
        return self.prepare(GenerationRequest.read(fields), uploads, job.facts["seed"])

    def _check_limits(self, asked: GenerationRequest) -> None:
        if asked.model not in (None, self.model_name, *OTHER_NAMES):
            raise UnknownModel("model", f"model {asked.model[:80]!r} is not served here; {self.model_name} is")
        texts = [("next_prompts", text) for text in asked.next_prompts or ()]
        for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt), *texts):
            length = len(text)
            if length > self.cfg.max_prompt:
                raise BadField(name, f"{name} has {length:,} letters; at most {self.cfg.max_prompt:,} are taken")

    def _too_much(self, plan: SamplePlan) -> str:
        return (
            f"{plan.width} x {plan.height} pixels x {plan.length} frames x {plan.num_steps} steps are "
            f"{work_of(plan):,} pixels to work out; this server takes {self.most_work:,.0f}: ask for a smaller or "
            "shorter video, or fewer steps"
        )

    def _cond_type(self, asked: GenerationRequest, uploads: Mapping[str, Path]) -> str:
        """Condition of a request: its own, or the one that its pictures say."""
        given = {(): "t2v", (FIRST,): "i2v_head", (LAST,): "i2v_tail", (FIRST, LAST): "i2v_loop"}
        names = tuple(name for name in GIVEN if name in uploads)
        said = asked.cond_type or ("region" if MASK in uploads else "frames" if asked.places else given.get(names))
        if said is None:
            raise BadField(SEVERAL, f"{SEVERAL}: say which frames they are (places), or what they fix (cond_type)")
        cond_type = said
        final = starts_from_picture(cond_type) if self.cfg.use_t2i2v and not names else cond_type
        takes_some = takes_references(final)
        most = len(GIVEN) if isinstance(get_condition(final), Anywhere) else max(len(get_spans(final)), 1)
        if MASK in uploads and not isinstance(get_condition(final), Region):
            raise BadField("mask", f"cond_type {cond_type} takes no mask; region keeps what is white in it")
        if names and not takes_some:
            raise BadField("cond_type", f"cond_type {cond_type} takes no picture; i2v_head starts from one")
        if takes_some and not names and not (self.cfg.use_t2i2v and get_spans(final)):
            raise BadField("input_reference", f"cond_type {cond_type} wants a picture or clip as input_reference")
        if isinstance(get_condition(final), Region) and MASK not in uploads:
            raise BadField("mask", "cond_type region wants a mask, white where the reference is kept")
        if len(names) > most:
            field = "last_reference" if names[most] == LAST else SEVERAL
            taken = "one reference; i2v_loop takes two" if most == 1 else "two references"
            raise BadField(field, f"cond_type {cond_type} takes {taken}; frames takes any, with places")
        return cond_type

    def _placed(self, refs: list[str], asked: GenerationRequest, cond_type: str) -> list[str]:
        """References with their places in the video."""
        if not isinstance(get_condition(cond_type), Anywhere):
            if asked.places:
                raise BadField("places", f"places are for cond_type frames, not {cond_type}")
            return refs
        places = [place.strip() for place in (asked.places or "").split(";") if place.strip()]
        placed = [f"{ref}@{place}" for ref, place in zip(refs, places)]
        if len(places) != len(refs) or any(split_place(each)[1] == "" for each in placed):
            raise BadField("places", f"places {(asked.places or '')[:40]!r}: give one for each reference, such as 0;-1")
        return placed

    def _lora(self, asked: GenerationRequest) -> str | None:
        """The adapter of a request, once it is known to fit."""
        if asked.lora is None:
            return None
        if asked.lora not in self.loras:
            known = ", ".join(self.loras) or "none"
            raise BadField("lora", f"lora {asked.lora[:80]!r} is not one of this server's adapters: {known}")
        if self.cfg.worker_processes > 1:
            raise BadField("lora", "this server's model is divided over several processes, which takes no lora")
        path = Path(str(self.cfg.lora_dir)).expanduser() / asked.lora
        if self.cfg.pretrained_lora_path and not self.cfg.merge_lora:
            raise BadField("lora", "this server's model has adapters beside its weights, which takes no further lora")
        entry = f"{path}@{asked.lora_strength!r}"
        key, changed = (asked.lora, asked.lora_strength), path.stat().st_mtime
        if self._lora_files.get(key) != changed:
            try:
                read_loras([entry], self.run.models["model"], self.cfg.lora_partial)
            except UserError as error:
                raise BadField("lora", str(error).replace(str(path), asked.lora)) from None
            if len(self._lora_files) > 1000:
                self._lora_files.clear()
            self._lora_files[key] = changed
        return entry


def _planned(cfg: ServeOptions, request: Request) -> str:
    """Condition of the sample in the end: where a picture is made first, it starts from that."""
    return starts_from_picture(request.cond_type) if cfg.use_t2i2v else request.cond_type


def work_of(plan: SamplePlan) -> int:
    """Pixels x frames x steps."""
    return plan.width * plan.height * plan.length * plan.num_steps


def check_served(cfg: ServeOptions) -> None:
    """Refuse keys that choose what a command line makes (in a server, requests say it), and places that are not there.

    Raises:
        UserError: names the key.
    """
    plain = ServeOptions()
    for key in ("prompt", "next_prompts", "ref", "mask", "start_index", "end_index", "num_samples", "num_sample",
                "save_prefix", "prompt_as_path", "skip_existing", "overwrite", "save_latents", "wait",
                "dry_run"):  # fmt: skip
        if getattr(cfg, key) != getattr(plain, key):
            raise UserError(f"--{key} {getattr(cfg, key)}: a server makes what its requests ask for; leave it out")
    if ";" in str(Path(cfg.data_dir).absolute()):
        raise UserError(f"data_dir {cfg.data_dir}: a ; in a path separates references; choose another folder")
    if cfg.lora_dir is not None and not is_folder(Path(cfg.lora_dir).expanduser()):
        raise UserError(f"lora_dir {cfg.lora_dir}: no such folder")
    if cfg.page:
        example_texts(cfg)
