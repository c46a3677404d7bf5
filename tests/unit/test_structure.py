"""The house's structure: rooms import downwards only, nothing in a circle, every room in the wheel, files small."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

#: Each room may import its own level and those before it.
LEVELS = (
    ("__init__", "domain", "events", "files", "settings"),
    ("traces", "tools"),
    ("miniature", "agents"),
    ("graph", "rl"),
    ("evals",),
    ("service",),
    ("api",),
    ("cli", "doctor", "__main__"),
)
RANK = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

#: Imports upward that are meant: (module, imported module) → why.
UPWARD = {
    ("emoloop", "emoloop.graph.loop"): "the public face names `open_loop` and loads it on first use",
}

MAX_LINES = 500

#: Libraries that take long to load: an import inside a function may keep one away from who does not need it.
HEAVY = {
    "accelerate", "datasets", "diffusers", "httpx", "langchain_core", "langchain_openai", "langgraph", "numpy",
    "openai", "opentelemetry", "peft", "PIL", "pyarrow", "pydantic_settings", "ray", "scipy", "sklearn", "sqlalchemy",
    "torch", "transformers", "trl",
}  # fmt: skip
#: Imports inside functions that neither weight nor a circle demands: (module, imported module) → why.
INSIDE: dict[tuple[str, str], str] = {
    ("emoloop.cli", "emoloop"): "the version is looked up only when it is asked for",
    ("emoloop.cli.evals", "emoloop.evals.suites"): "only an error names the suites",
}
#: Circles still there, by their first step.
CIRCLES: set[tuple[str, str]] = set()


def _files() -> list[Path]:
    folders = [ROOT, *(ROOT / room for room in RANK if (ROOT / room).is_dir())]
    return sorted(
        {
            file
            for folder in folders
            for file in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
        }
    )


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(["emoloop", *(parts[:-1] if parts[-1] == "__init__" else parts)])


@cache
def _modules() -> dict[str, ast.Module]:
    return {_name(file): ast.parse(file.read_text()) for file in _files()}


def _room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def _is_package(module: str) -> bool:
    return (ROOT.joinpath(*module.split(".")[1:]) / "__init__.py").is_file()


def _named(module: str, node: ast.AST) -> set[str]:
    """The modules of ours that one import statement names."""
    known = _modules()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & set(known)
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = node.module or ""
    if node.level:
        package = module.split(".") if _is_package(module) else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
    inner = {f"{base}.{alias.name}" for alias in node.names} & set(known)
    outer = {alias.name for alias in node.names if f"{base}.{alias.name}" not in known}
    return inner | ({base} & set(known) if outer else set())


def _typing_only(tree: ast.Module) -> set[int]:
    """Ids of the nodes under `if TYPE_CHECKING`."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }


def _edges(module: str) -> list[tuple[str, bool]]:
    """(imported module of ours, whether inside a function) of each import that runs."""
    tree, found = _modules()[module], []
    typing = _typing_only(tree)
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) not in typing:
            found += [(name, id(node) in inside) for name in sorted(_named(module, node)) if name != module]
    return found


def test_every_room_has_its_level():
    assert {_room(module) for module in _modules()} <= set(RANK)


def test_no_arrow_runs_upward():
    upward = [
        f"{module} → {target}"
        for module in _modules()
        for target, _ in _edges(module)
        if RANK[_room(target)] > RANK[_room(module)] and (module, target) not in UPWARD
    ]
    assert not upward, "\n".join(upward)


def test_distillation_has_never_seen_the_graph():
    for module in _modules():
        if _room(module) == "rl":
            assert not [target for target, _ in _edges(module) if _room(target) == "graph"], module


def test_no_import_circle():
    graph = {module: sorted({target for target, _ in _edges(module)}) for module in _modules()}
    done: set[str] = set()
    circles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append(" → ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in graph[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    circles = [circle for circle in circles if tuple(circle.split(" → ")[:2]) not in CIRCLES]
    assert not circles, "\n".join(circles)


def test_files_are_short():
    assert not [f for f in _files() if len(f.read_text().splitlines()) > MAX_LINES]


@cache
def _loads(module: str) -> frozenset[str]:
    """What importing a module loads: modules of ours and heavy libraries, all told."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        # Importing a.b.c runs a and a.b too.
        chain = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)} & set(_modules())
        for each in chain - found:
            found.add(each)
            waiting += [target for target, inner in _edges(each) if not inner]
            tree, typing = _modules()[each], _typing_only(_modules()[each])
            skipped = typing | {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                if id(node) in skipped:
                    continue
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names} & HEAVY
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found |= {(node.module or "").split(".")[0]} & HEAVY
    return frozenset(found)


def test_imports_inside_functions_have_a_reason():
    inside = sorted(
        {
            (module, target)
            for module in _modules()
            for target, inner in _edges(module)
            if inner and not (_loads(target) & HEAVY) - _loads(module) and module not in _loads(target)
        }
        - set(INSIDE)
    )
    listed = "\n".join(f"{module}: {target}" for module, target in inside)
    assert not inside, listed


def test_every_module_says_what_it_is():
    silent = [module for module, tree in _modules().items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_nothing_is_left_to_do():
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    files = [*_files(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert not [str(file) for file in files if any(mark in file.read_text() for mark in marks)]


def test_the_wheel_has_every_room():
    folders = {_name(file) for file in _files() if file.name == "__init__.py"}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])
    loose = {str(file.parent) for file in _files() if not (file.parent / "__init__.py").is_file()}
    assert not loose, "folders with modules but without __init__.py"


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["package-data"])
def test_each_pattern_of_data_finds_files(package):
    folder = ROOT.joinpath(*package.split(".")[1:])
    for pattern in PROJECT["tool"]["setuptools"]["package-data"][package]:
        assert list(folder.glob(pattern)), f"{package}: {pattern}"
