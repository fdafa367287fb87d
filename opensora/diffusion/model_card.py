"""The model card of a pipeline: the README.md that hubs show, with the metadata that they sort by."""

import json
from collections.abc import Mapping
from string import Template
from typing import Any

CARD = Template(
    """---
license: $license
library_name: opensora
pipeline_tag: text-to-video
tags:
- text-to-video
- image-to-video
- diffusers
- opensora
---

# $name

Text$more to video, a pipeline of Open-Sora.

```python
from opensora import VideoPipeline, save_video

pipe = VideoPipeline.from_pretrained("$place")
save_video(pipe("a prompt", seed=42).frames[0], "video.mp4", fps=$fps)
```

```bash
opensora generate $place --prompt "a prompt"
```

With diffusers, where opensora is installed too (the files of this folder that are run import it):

```python
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipe = DiffusionPipeline.from_pretrained("$place", trust_remote_code=True)
export_to_video(pipe("a prompt").frames[0], "video.mp4", fps=$fps)
```

| part | class | parameters | file |
|---|---|---|---|
$parts

Precision of the weights: `$dtype`. How it samples unless told otherwise (`config.json`):

```json
$sampling
```

License of the weights: $told.
"""
)


def pipeline_card(
    config: Mapping[str, Any], parameters: Mapping[str, int], name: str, license: str | None = None
) -> str:
    """The card.

    Args:
        config: content of the folder's ``config.json``.
        parameters: of each part, by its folder.
        name: id or folder of the pipeline; a prefix such as ``modelscope:`` stays in what one types.
        license: identifier of the weights' licence, None where it is not known.
    """
    sections = {path.split("/")[0]: section for section, path in _parts(config)}
    rows = [
        f"| {folder} | `{sections[folder]['type']}` | {count:,} | `{sections[folder]['from_pretrained']}` |"
        for folder, count in parameters.items()
    ]
    takes_pictures = bool(config.get("model", {}).get("cond_embed"))
    return CARD.substitute(
        license=license or "other",
        told=license or "not stated by whoever saved this folder; ask before you use them",
        name=name.rpartition(":")[2],
        place=name,
        more=" (or a picture, or a clip)" if takes_pictures else "",
        fps=config.get("fps_save", 16),
        parts="\n".join(rows),
        dtype=config["dtype"],
        sampling=json.dumps(config["sampling_option"], indent=2),
    )


def _parts(config: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """Sections of a config that name weights, and where these are."""
    sections = [value for value in config.values() if isinstance(value, Mapping) and value.get("from_pretrained")]
    return [(section, section["from_pretrained"]) for section in sections]
