"""The walls between the rooms of deepseek_moe: which folder may import which, and what is lazy."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deepseek_moe"
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
    if file != PACKAGE / "__init__.py"
}


@cache
def imports(module: str) -> set[str]:
    """The modules of this package that `module` imports, inside its functions too."""
    found, folder = set(), MODULES[module].relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        path = [*folder[: len(folder) - node.level + 1]] if node.level else []
        path += node.module.split(".") if node.module else []
        if not node.level and path.pop(0) != "deepseek_moe":
            continue
        for alias in node.names:
            inner = ".".join([*path, alias.name])
            found.add(inner if inner in MODULES else ".".join(path))
    return found


def reached(start: str) -> set[str]:
    """All modules of this package that an import of `start` may load, packages around them too."""
    found: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        parts = module.split(".")
        for one in [".".join(parts[:n]) for n in range(1, len(parts) + 1)]:
            if one in MODULES and one not in found:
                found.add(one)
                todo += imports(one)
    return found


@pytest.mark.parametrize("room", ["model", "kernels"])
def test_a_room_that_imports_no_other(room):
    inside = [module for module in MODULES if module.split(".")[0] == room]
    assert len(inside) > 4
    assert {found.split(".")[0] for module in inside for found in imports(module)} == {room}


@pytest.mark.parametrize(("room", "other"), [("decode", "training"), ("training", "decode")])
def test_decoding_and_training_stand_apart(room, other):
    """Neither reaches the other by any chain of imports, nor do their kernels."""
    inside = [module for module in MODULES if room in module.split(".")]
    met = set().union(*map(reached, inside))
    assert met > set(inside) and "model.modeling_deepseek" in met
    assert not {module for module in met if other in module.split(".")}


def test_the_room_of_experts_uses_neither_decoding_nor_training():
    met = set().union(*(reached(m) for m in MODULES if m.split(".")[0] == "experts"))
    assert "experts.profile" in met
    assert not {module for module in met if {"decode", "training"} & set(module.split(".")[:1])}


def test_the_room_of_evaluation_uses_no_training():
    met = set().union(*(reached(m) for m in MODULES if m.split(".")[0] == "evaluate"))
    assert {"evaluate.harness", "decode.generation"} <= met
    assert not {module for module in met if "training" in module.split(".")}


@pytest.mark.parametrize(
    ("starts", "most"),
    [(("decode.generation",), 4593), (("training.examples", "training.build"), 5320)],
)
def test_a_reader_of_either_path_meets_few_lines(starts, most):
    """From ids to ids, and from a row to the gradient of an expert."""
    modules = set().union(*map(reached, starts))
    lines = {m: len(MODULES[m].read_text(encoding="utf-8").splitlines()) for m in modules}
    assert sum(lines.values()) <= most, lines


IMPORT = """
import sys
import deepseek_moe

rooms = {name.split(".")[1] for name in sys.modules if name.startswith("deepseek_moe.")}
assert rooms == {"model", "registration"}, rooms
slow = {"bitsandbytes", "datasets", "deepspeed", "peft"} & sys.modules.keys()
assert not slow, slow
from deepseek_moe import Generator, load
assert "deepseek_moe.decode.engine" in sys.modules
assert not any(name.startswith("deepseek_moe.training") for name in sys.modules)
"""


def test_the_package_is_cheap_to_import_and_decoding_comes_on_demand():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
