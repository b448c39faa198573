"""The walls between the rooms of deepseek_moe: which folder may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "deepseek_moe"
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
    if file != PACKAGE / "__init__.py"
}


def imports(module: str) -> Iterator[str]:
    """The modules of this package that `module` imports, inside its functions too."""
    file = MODULES[module]
    folder = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            above = folder[: len(folder) - node.level + 1]
            found = ".".join([*above, *filter(None, [node.module])])
        elif node.module.split(".")[0] == "deepseek_moe":
            found = node.module.partition(".")[2]
        else:
            continue
        for alias in node.names:
            inner = f"{found}.{alias.name}".removeprefix(".")
            yield inner if inner in MODULES else found


def is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def crossings(room: str, allowed: tuple[str, ...] = (), refused: tuple[str, ...] = ()) -> set[str]:
    """Imports out of `room`, without those into `allowed`, or only those into `refused`."""
    return {
        f"{module} imports {other or 'deepseek_moe'}"
        for module in MODULES
        if is_in(module, room)
        for other in imports(module)
        if any(is_in(other, one) for one in refused)
        or (not refused and not any(is_in(other, one) for one in (room, *allowed)))
    }


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


def test_the_model_stands_alone() -> None:
    assert not crossings("model")


def test_kernels_import_nothing_above_them() -> None:
    assert not crossings("kernels")


@pytest.mark.parametrize(
    ("room", "other"), [("decode", "training"), ("kernels.decode", "kernels.training")]
)
def test_decoding_and_training_stand_apart(room: str, other: str) -> None:
    assert not crossings(room, refused=(other,))
    assert not crossings(other, refused=(room,))


def test_neither_path_reaches_the_other() -> None:
    decoding, training = reached("decode.generation"), reached("training.trainer")
    assert "decode.engine" in decoding and "training.run" not in decoding
    assert not {module for module in decoding if "training" in module.split(".")}
    assert not {module for module in training if "decode" in module.split(".")}


@pytest.mark.parametrize(
    "starts", [("decode.generation",), ("training.examples", "training.build")]
)
def test_a_reader_of_either_path_meets_few_lines(starts: tuple[str, ...]) -> None:
    """From ids to ids, and from a row to the gradient of an expert."""
    modules = set().union(*map(reached, starts))
    lines = {m: len(MODULES[m].read_text(encoding="utf-8").splitlines()) for m in modules}
    assert sum(lines.values()) <= 4300, lines


def test_the_walls_can_fail() -> None:
    assert crossings("decode", refused=("kernels",))
    assert crossings("model", allowed=()) != crossings("decode", allowed=())
