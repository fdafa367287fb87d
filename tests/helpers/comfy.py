"""What ComfyUI does with custom nodes: the modules they import, how a workflow is checked, and how it is executed.

Written after ComfyUI's `execution.py`, `nodes.py`, `comfy/utils.py` and `folder_paths.py` (their names and behaviour).
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class Interrupted(Exception):
    """``comfy.model_management.InterruptProcessingException``."""


class Comfy:
    """The modules that nodes find, and what they did with them.

    Attributes:
        shown: (value, total) of every bar.
        interrupt_at: number of updates after which the user cancels; None: never.
        freed: how often ComfyUI's models were taken off the GPU.
    """

    def __init__(self, loras: Path) -> None:
        self.shown: list[tuple[int, int]] = []
        self.interrupt_at: int | None = None
        self.freed = 0
        self.loras = loras

    def modules(self) -> dict[str, ModuleType]:
        """By name, for ``sys.modules``."""
        comfy, management, utils, paths = map(
            ModuleType, ("comfy", "comfy.model_management", "comfy.utils", "folder_paths")
        )
        shown = self.shown

        class ProgressBar:
            def __init__(self, total, node_id=None):
                self.total = total

            def update_absolute(self, value, total=None, preview=None):
                shown.append((value, total or self.total))

        def throw_if_interrupted():
            if self.interrupt_at is not None and len(shown) >= self.interrupt_at:
                raise Interrupted

        def unload():
            self.freed += 1

        utils.ProgressBar = ProgressBar
        management.throw_exception_if_processing_interrupted = throw_if_interrupted
        management.InterruptProcessingException = Interrupted
        management.unload_all_models, management.soft_empty_cache = unload, lambda force=False: None
        comfy.model_management, comfy.utils = management, utils
        paths.get_filename_list = lambda kind: sorted(file.name for file in self.loras.iterdir())
        paths.get_full_path = lambda kind, name: str(file) if (file := self.loras / name).exists() else None
        return {module.__name__: module for module in (comfy, management, utils, paths)}


class SaveAnimatedWEBP:
    """Inputs of the core node of this name; keeps what it gets."""

    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION, OUTPUT_NODE, CATEGORY = "save", True, "image"
    got: list[tuple[torch.Tensor, float]] = []

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE",),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "fps": ("FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0}),
                "lossless": ("BOOLEAN", {"default": True}),
                "quality": ("INT", {"default": 80, "min": 0, "max": 100}),
                "method": (["default", "fastest", "slowest"],),
            }
        }

    def save(self, images, fps, **_):
        self.got.append((images, fps))
        return {"ui": {}}


def load_package(folder: Path) -> ModuleType:
    """Import a folder as ComfyUI imports ``custom_nodes/NAME``."""
    name = "custom_nodes_under_test"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


Graph = dict[int, dict[str, Any]]


def as_graph(workflow: dict[str, Any], classes: dict[str, Any]) -> Graph:
    """A saved workflow as the page sends it to be executed: node -> class and inputs (values, or (node, slot))."""
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    graph: Graph = {}
    for node in workflow["nodes"]:
        kinds = all_inputs(classes[node["type"]])
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, kind in kinds.items():
            if is_widget(kind):
                inputs[name] = next(values)
                if len(kind) > 1 and kind[1].get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert not list(values), f"{node['type']}: more values than widgets"
        inputs |= {each["name"]: links[each["link"]] for each in node["inputs"] if each["link"] is not None}
        graph[node["id"]] = {"class_type": node["type"], "inputs": inputs}
    return graph


def all_inputs(node_class: Any) -> dict[str, tuple]:
    kinds = node_class.INPUT_TYPES()
    assert set(kinds) <= {"required", "optional", "hidden"}
    return {**kinds["required"], **kinds.get("optional", {})}


def is_widget(kind: tuple) -> bool:
    return isinstance(kind[0], list) or kind[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")


def check(graph: Graph, classes: dict[str, Any]) -> None:
    """What ComfyUI refuses before it executes anything."""
    for node in graph.values():
        node_class, inputs = classes[node["class_type"]], node["inputs"]
        kinds = all_inputs(node_class)
        assert set(node_class.INPUT_TYPES()["required"]) <= set(inputs), node
        for name, value in inputs.items():
            wanted, options = kinds[name][0], kinds[name][1] if len(kinds[name]) > 1 else {}
            if isinstance(value, tuple):
                source = classes[graph[value[0]]["class_type"]]
                assert source.RETURN_TYPES[value[1]] == wanted, (node["class_type"], name)
            elif isinstance(wanted, list):
                assert value in wanted, (node["class_type"], name, value)
            else:
                value = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}[wanted](value)
                assert options.get("min", value) <= value <= options.get("max", value), (name, value)


class Executor:
    """Runs graphs; what a node gave is kept for the next one as long as its inputs stay, as ComfyUI keeps it."""

    def __init__(self, classes: dict[str, Any]) -> None:
        self.classes = classes
        self.kept: dict[int, tuple[Any, tuple]] = {}
        self.ran: list[str] = []

    def execute(self, graph: Graph) -> None:
        """All nodes that others, or outputs, need."""
        check(graph, self.classes)
        self.ran = []
        with torch.inference_mode():
            for number, node in graph.items():
                if getattr(self.classes[node["class_type"]], "OUTPUT_NODE", False):
                    self._result(graph, number)

    def _result(self, graph: Graph, number: int) -> tuple[Any, tuple]:
        """What identifies a node's inputs, and what it gives."""
        node = graph[number]
        sources = {
            name: self._result(graph, value[0]) for name, value in node["inputs"].items() if type(value) is tuple
        }
        signature = (node["class_type"], *node["inputs"].items(), *((name, each[0]) for name, each in sources.items()))
        if number not in self.kept or self.kept[number][0] != signature:
            values = {
                name: sources[name][1][value[1]] if name in sources else value for name, value in node["inputs"].items()
            }
            self.ran.append(node["class_type"])
            instance = self.classes[node["class_type"]]()
            self.kept[number] = (signature, getattr(instance, instance.FUNCTION)(**values))
        return self.kept[number]
