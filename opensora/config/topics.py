"""What a script's keys are for: the headings under which ``--help`` lists them, in this order."""

from enum import StrEnum


class Topic(StrEnum):
    """A heading. A key names its topic with ``opt(..., topic=Topic.DATA)``; the keys after it share it."""

    SERVER = "server"
    LIMITS = "limits of the server"
    PROMPTS = "prompts and references"
    SAMPLING = "size, length and sampling"
    OUTPUT = "output"
    DATA = "data"
    MODELS = "models and weights"
    T2I2V = "text to image to video"
    LORA = "LoRA"
    OBJECTIVE = "training objective"
    OPTIMIZER = "optimizer and length of the run"
    RESUME = "experiment folder, checkpoints and resume"
    REPORTS = "logging, validation and samples"
    SPEED = "speed and memory"
    DEVICES = "several devices"
    PROFILING = "profiling"
    GENERAL = "general"
