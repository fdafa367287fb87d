"""The form of the page, from what the server's config and limits allow."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from opensora.config.choices import CONDITIONS
from opensora.config.options import SamplingOption
from opensora.datasets.aspect import BASE_RATIOS
from opensora.serving.desk import work_of
from opensora.serving.examples import example_texts
from opensora.serving.service import Service
from opensora.serving.words import say
from opensora.utils.errors import UserError

SIDES = (64, 128, 192, 256, 384, 512, 768, 1024)


class Form:
    """What a request is made of, as components.

    Args:
        service: that gets the requests.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.desk, self.cfg = service, service.desk, service.cfg
        self.option: SamplingOption = service.desk.settings.sampling_option
        self.named: list[tuple[Any, dict[str, str]]] = []  # components with texts: word by property

    def said(self, component: Any, **words: str) -> Any:
        """A component whose properties are said in the page's language."""
        self.named.append((component, words))
        return component

    def build_form(self) -> None:
        """Make the components, where Gradio is laying out."""
        hint: dict[str, Any] = {"placeholder": say("prompt_hint", "en")}
        prompt = gr.Textbox(label=say("prompt", "en"), lines=3, max_lines=8, elem_id="prompt", **hint)
        self.prompt = self.said(prompt, label="prompt", placeholder="prompt_hint")
        texts = example_texts(self.cfg)
        if texts:
            examples = gr.Examples([[text] for text in texts], [prompt], label=say("examples", "en"))
            self.said(examples.dataset, label="examples")
        self._pictures()
        self._sizes()
        with self.said(gr.Accordion(say("more", "en"), open=False), label="more"):
            self._more()
        with gr.Row():
            self.make = self.said(
                gr.Button(say("make", "en"), variant="primary", elem_id="make", scale=3), value="make"
            )
            self.cancel = self.said(gr.Button(say("cancel", "en"), elem_id="cancel", interactive=False), value="cancel")

    def _pictures(self) -> None:
        takes = self.desk.takes_references
        with self.said(gr.Accordion(say("pictures", "en"), open=False, visible=takes), label="pictures"), gr.Row():
            how: dict[str, Any] = dict(type="filepath", sources=["upload", "clipboard"], height=170, buttons=[])
            self.first = self.said(gr.Image(elem_id="first", **how), label="first", placeholder="drop")
            self.last = self.said(gr.Image(elem_id="last", **how), label="last", placeholder="drop")

        with self.said(gr.Accordion(say("given", "en"), open=False, visible=takes), label="given"):
            self._given()

    def _given(self) -> None:
        """Pictures and clips at any places, or kept in part."""
        with gr.Row():
            files: dict[str, Any] = dict(file_count="multiple", file_types=["image", "video"], height=170)
            self.references = self.said(gr.File(elem_id="references", **files), label="references")
            how: dict[str, Any] = dict(type="filepath", sources=["upload"], height=170, buttons=[], image_mode=None)
            self.mask = self.said(gr.Image(elem_id="mask", **how), label="mask", placeholder="drop")
        with gr.Row():
            places = gr.Textbox(elem_id="places", lines=1)
            self.places = self.said(places, label="places", placeholder="places_hint")
            conditions = [("–", ""), *((name, name) for name in CONDITIONS if name != "t2v")]
            fixes = gr.Dropdown(conditions, value="", elem_id="fixes")
            self.fixes = self.said(fixes, label="fixes", info="fixes_hint")

    def _sizes(self) -> None:
        sizes, ratios = self.resolutions(), self.ratios()
        lengths = self._lengths()
        with gr.Row():
            self.size = self.said(gr.Dropdown(sizes, value=sizes[0], label="Size", elem_id="size"), label="size")
            self.ratio = self.said(gr.Dropdown(ratios, value=ratios[0], label="Aspect ratio"), label="ratio")
        with gr.Row():
            at: dict[str, Any] = dict(minimum=lengths[0], maximum=lengths[-1], step=lengths[1] - lengths[0])
            value = self.option.num_frames
            length = gr.Slider(**at, value=value, label=self._length("en"), elem_id="length")
            self.length = self.said(length, label="length")
            steps = gr.Slider(1, max(100, self.option.num_steps), self.option.num_steps, step=1, elem_id="steps")
            self.steps = self.said(steps, label="steps")

    def _length(self, language: str) -> str:
        return say("length", language, fps=self.cfg.fps_save)

    def _fits(self, **changes: Any) -> bool:
        """Whether a sample of other sampling options is within the server's limits."""
        plain = {**self.option.to_dict(), **changes}
        try:
            plan = self.desk.plan(SamplingOption(**plain))
        except (UserError, TypeError):
            return False
        return work_of(plan) <= self.desk.most_work

    def resolutions(self) -> list[str]:
        """The config's own first, then what else is within the limits."""
        option = self.option
        own = option.resolution or f"{option.width}x{option.height}"
        ratio = option.aspect_ratio or "1:1"
        others = [f"{side}px" for side in SIDES if f"{side}px" != own]
        named = dict(height=None, width=None, aspect_ratio=ratio)
        return [own, *(name for name in others if self._fits(resolution=name, **named))]

    def ratios(self) -> list[str]:
        """The config's own first, then what else is within the limits."""
        own = self.option.aspect_ratio or "1:1"
        mirrored = [":".join(reversed(ratio.split(":"))) for ratio in BASE_RATIOS]
        every = [ratio for ratio in dict.fromkeys(("16:9", "9:16", "1:1", *BASE_RATIOS, *mirrored)) if ratio != own]
        named = dict(height=None, width=None, resolution=self.resolutions()[0])
        return [
            own,
            *(ratio for ratio in every if self.option.resolution and self._fits(**{**named, "aspect_ratio": ratio})),
        ]

    def _lengths(self) -> list[int]:
        spec = self.desk.run.plan.spec
        ratio, lead = spec.compression[0], int(spec.is_causal)
        longest = max(4 * self.option.num_frames, 4 * ratio)
        found = [n for n in range(ratio + lead, longest + 1, ratio) if self._fits(num_frames=n)]
        return found if len(found) > 1 else [ratio + lead, 2 * ratio + lead]

    def _more(self) -> None:
        self.negative = self.said(
            gr.Textbox(label="Negative prompt", lines=1), label="negative", placeholder="negative_hint"
        )
        with gr.Row():
            self.guidance = self.said(gr.Slider(0, 20, self.option.guidance, step=0.1), label="guidance")
            self.seed = self.said(gr.Textbox(elem_id="seed"), label="seed", placeholder="seed_hint")
        with gr.Row():
            own = self.cfg.motion_score if str(self.cfg.motion_score).isdigit() else ""
            scores = [("–", ""), *((str(score), str(score)) for score in range(1, 16))]
            self.motion = self.said(gr.Dropdown(scores, value=own), label="motion", info="motion_hint")
            can = self.desk.can_refine
            self.refine = self.said(gr.Checkbox(self.cfg.refine_prompt, interactive=can), label="refine")
        further = gr.Textbox(elem_id="next_prompts", lines=2, visible=self.option.window is not None)
        self.further = self.said(further, label="next_prompts", placeholder="next_prompts_hint")
        names = [("–", ""), *((name, name) for name in self.desk.loras)]
        with gr.Row():
            self.lora = self.said(gr.Dropdown(names, value="", interactive=len(names) > 1), label="lora")
            self.strength = self.said(gr.Slider(-2, 2, 1.0, step=0.05, interactive=len(names) > 1), label="strength")

    @property
    def fields(self) -> dict[str, Any]:
        """Components of the form by field of a request."""
        return {
            "prompt": self.prompt,
            "resolution": self.size,
            "aspect_ratio": self.ratio,
            "num_frames": self.length,
            "num_inference_steps": self.steps,
            "negative_prompt": self.negative,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "motion_score": self.motion,
            "refine_prompt": self.refine,
            "lora": self.lora,
            "lora_strength": self.strength,
            "references": self.references,
            "mask": self.mask,
            "places": self.places,
            "cond_type": self.fixes,
            "next_prompts": self.further,
        }

    def fields_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The form as fields of a request: what is empty, or the config's own, is left out."""
        fields = {name: value for name, value in values.items() if value not in (None, "", [])}
        own = self.resolutions()[0]
        if fields.get("resolution") == own:
            fields.pop("resolution")
        if self.option.aspect_ratio in (None, fields.get("aspect_ratio")) and "resolution" not in fields:
            fields.pop("aspect_ratio", None)
        if "lora" not in fields:
            fields.pop("lora_strength", None)
        if not self.desk.can_refine:
            fields.pop("refine_prompt", None)
        return fields
