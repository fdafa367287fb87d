"""Imports run one way: read from the sources, so that a forgotten function-level import counts too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "opensora"
# A package imports from its own and from those of lower rank; packages of equal rank do not know each other.
RANKS = {
    **{"base": 0, "models": 1, "datasets": 1, "acceleration": 2, "encoded": 2, "diffusion": 3},
    **{"generation": 4, "training": 4, "evaluation": 4, "benchmark": 4, "serving": 5},
    **{"cli": 6, "__main__": 7, "__init__": 7},  # the last two: the package's front door
}
NEVER_AT_IMPORT = {
    "flash_attn",
    "flash_attn_interface",
    "xformers",
    "liger_kernel",
    "tensornvme",
    "apex",
    "bitsandbytes",
    "torchao",
}
MMENGINE_FILES = {"opensora/config/registries.py", "opensora/config/load.py"}
COLOSSALAI_PACKAGES = {"acceleration", "training"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> Iterator[str]:
    return imported(path, ast.parse(path.read_text(), str(path)))


def layer(dotted: str) -> str:
    """Layer of a module of the package: a sub-package with a rank, else the base."""
    part = dotted.split(".")[1] if "." in dotted else ""
    return part if part in RANKS else "base"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_package_has_a_rank():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - {"utils", "config"} == set(RANKS) - {"base", "__main__", "__init__"}


def test_imports_run_one_way():
    wrong = []
    for path in sources("opensora"):
        own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imports_of(path):
            if module.split(".")[0] == "opensora":
                other = layer(module)
                if other != own and RANKS[other] >= RANKS[own]:
                    wrong.append(f"{name(path)} imports {module}")
    assert wrong == []


def test_package_imports_no_script_and_no_tool():
    wrong = [
        f"{name(path)} imports {module}"
        for path in sources("opensora")
        for module in imports_of(path)
        if module.split(".")[0] in ("scripts", "tools", "tests", "configs")
    ]
    assert wrong == []


def test_only_two_files_know_mmengine():
    users = {
        name(p) for p in sources("opensora", "scripts", "tools") if any(m.startswith("mmengine") for m in imports_of(p))
    }
    assert users <= MMENGINE_FILES


def test_only_acceleration_and_training_know_colossalai():
    wrong = [
        name(path)
        for path in sources("opensora", "scripts", "tools")
        if any(module.split(".")[0] == "colossalai" for module in imports_of(path))
        and (
            path.relative_to(ROOT).parts[0] != "opensora" or path.relative_to(ROOT).parts[1] not in COLOSSALAI_PACKAGES
        )
    ]
    assert wrong == []


def test_no_torchvision_anywhere():
    assert [
        name(p)
        for p in sources("opensora", "scripts", "tools")
        if any(m.startswith("torchvision") for m in imports_of(p))
    ] == []


@pytest.mark.parametrize("folder", ["opensora", "scripts", "tools"])
def test_optional_kernels_are_looked_up_when_chosen(folder):
    wrong = []
    for path in sources(folder):
        tree = ast.parse(path.read_text(), str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []  # what runs later may import what it likes
        wrong += [f"{name(path)}: {m}" for m in imported(path, tree) if m.split(".")[0] in NEVER_AT_IMPORT]
    assert wrong == []


def test_mmdit_imports_little():
    unwanted = [
        "colossalai",
        "diffusers",
        "transformers",
        "av",
        "pandas",
        "pyarrow",
        "peft",
        "openai",
        *NEVER_AT_IMPORT,
    ]
    code = f"import sys, opensora.models.mmdit; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
