"""The structure of the package: imports point one way, functions fit a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "d2kd"

# From the ground up; a module imports from its own floor or from those below.
FLOORS = (
    ("errors", "registry", "files", "keys", "arguments"),
    (
        *("numerics", "schedules", "config", "config_paths", "config_files", "config_rules"),
        *("balance", "checkpoint_files", "lazy_config"),
    ),
    ("geometry", "losses"),
    ("detectors", "models", "data"),
    ("heads", "prototypes"),
    ("meta_arch",),
    ("engine",),
    ("compare", "benchmark", "export", "commands", "cli", "__main__", "__init__"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MAX_FUNCTION_LINES = 60
MAX_CONSTRUCTOR_PARAMETERS = 8


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that ``name`` imports anywhere, inside of functions too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "d2kd")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source.split(".")[0] != "d2kd":
                continue
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in known else source


def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    known = modules()
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def floor(module: str) -> int:
    """The floor a module stands on; the package itself stands on the top floor."""
    parts = module.split(".")
    return FLOOR_OF[parts[1] if len(parts) > 1 else "__init__"]


def test_every_module_has_a_floor():
    """A new file or package belongs somewhere: FLOORS says where."""
    missing = {name for name in modules() if name != "d2kd" and name.split(".")[1] not in FLOOR_OF}
    assert not missing


def test_no_import_points_upwards():
    """Dependencies point one way: to the same floor or to one below."""
    upwards = [
        f"{module} -> {other}"
        for module, others in graph().items()
        for other in sorted(others)
        if floor(other) > floor(module)
    ]
    assert not upwards


def test_no_import_circle():
    """No module imports itself over others; a package counts as its __init__."""
    edges, done = graph(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in sorted(edges[module]):
            visit(other, (*path, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_losses_and_geometry_know_no_detector():
    """They take tensors and return tensors."""
    for module, others in graph().items():
        if module.startswith(("d2kd.losses", "d2kd.geometry")):
            assert all(floor(other) <= floor("d2kd.losses") for other in others), module


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(place, function) of all functions of the package."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}:{node.lineno} {node.name}", node


def test_functions_fit_a_screen():
    """At most 60 lines each."""
    long = [
        place
        for place, node in functions()
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_constructors_are_short():
    """At most 8 parameters; a method's values are one typed Options object."""
    wide = []
    for place, node in functions():
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.name == "__init__" and len(parameters) - 1 > MAX_CONSTRUCTOR_PARAMETERS:
            wide.append(place)
    assert not wide


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_says_what_it_is_for(module):
    """Each file opens with a docstring."""
    text = modules()[module].read_text()
    assert ast.get_docstring(ast.parse(text)), module


def test_the_package_does_not_grow_unseen():
    """A larger bound is a decision: most of the package is not methods but data, commands and
    comparisons, and what could go again is easily overlooked."""
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert lines <= 31_120
