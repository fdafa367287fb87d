# The same with captions from an OpenAI-compatible endpoint; see docs/data.md for which one and at what cost.
_base_ = ["default.py"]
stages = [
    "ingest",
    "scenes",
    "cut",
    "motion",
    "camera",
    "flow",
    "blur",
    "frames",
    "ocr",
    "duplicates",
    "filter",
    "caption",
]
caption = dict(template="motion")
