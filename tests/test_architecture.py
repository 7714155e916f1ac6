"""The picture of docs/architecture.md: who may import what, how long files are, what they are."""

import ast
import gc
import graphlib
import re
import runpy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["ghost_core", "ghost_layers", "ghost_engines", "ghost_examples"]

# The floors of ghost-core, from the ground: each imports from floors below its own only.
# Names on one floor do not know each other. The package's own name is its face.
FLOORS = [
    {"restoring"},
    {"errors", "_torch", "switches"},
    {"arguments", "process"},
    {"algebra", "ranks"},
    {"sampler", "projection", "policy"},
    {"model_hooks", "state", "batch", "differentiation"},
    {"tracking"},
    {"split"},
    {"capture"},
    {"plugins"},
    {"compare"},
    {"engine"},
    {"ghost_core"},
    {"testing"},
]

# Whose tests lie in folders named after the wings that they look into.
TESTS = [
    "packages/ghost-core/tests",
    "packages/ghost-layers/tests",
    "packages/ghost-engines/tests",
    "tests",
]

# What takes seconds to import, as torch does, or need not be there, by the module that waits.
IMPORTED_WHERE_USED = {
    "ghost_engines.cli.commands": {
        "ghost_core",
        "ghost_engines.cli.foreign",
        "ghost_engines.cli.remedies",
    },
    "ghost_engines.cli.config": {
        "ghost_core",
        "ghost_engines.cli.errors",
        "ghost_engines.extras",
    },
    # A plain checkout may lack what hashes and the command line need, and has engines all the same.
    "ghost_engines.plugin": {"ghost_engines.cli"},
    "ghost_engines.store.hashes": {"xxhash"},
}

USE_PRIVATE_NAMES = {"ghost_core._torch", "ghost_core.process"}
"""Where private names of torch stand, with the version that each was seen in."""

NO_NAMES_OF_TORCH = {"_exit", "_fields", "_getframe", "_replace", "_to_copy"}
"""Private names of Python's, and of an operation."""

TOLD_TO_USE = (
    "torch.utils._pytree.",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "something._saved_",
)
"""What only looks private: torch's own pages say to use it."""

Graph = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """Return the files of all packages by the dotted name of their module."""
    found = {}
    for package in PACKAGES:
        src = ROOT / "packages" / package.replace("_", "-") / "src"
        for path in sorted((src / package).rglob("*.py")):
            parts = path.relative_to(src).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


@cache
def parsed() -> dict[str, ast.Module]:
    """Return the syntax trees of all files by the dotted name of their module."""
    return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    """Keep half a million objects no longer than needed: every look for garbage meets them."""
    gc.disable()
    yield
    parsed.cache_clear()
    gc.enable()


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and all below it, as `ast.walk` does in three times the time."""
    left = [tree]
    while left:
        yield (node := left.pop())
        for value in vars(node).values():
            if isinstance(value, ast.AST):
                left.append(value)
            elif type(value) is list:
                left += [each for each in value if isinstance(each, ast.AST)]


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a node imports, by statement or by call; what is no module is cut."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            for alias in names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in MODULES else module
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            yield module


def imports(tree: ast.AST) -> set[str]:
    """Return what a module imports anywhere: inside functions and for the type checker, too."""
    return {name for node in walk(tree) for name in imported(node)}


def graph(trees: Mapping[str, ast.AST]) -> Graph:
    """Return which of the modules imports which."""
    return {name: imports(tree) & trees.keys() for name, tree in trees.items()}


def room(module: str) -> str:
    """Return the part of its package that a module belongs to: `package.wing`, or itself."""
    return ".".join(module.split(".")[:2])


def closed(module: str) -> bool:
    """Tell whether a module lies inside a wing. The test kit is for all to look into."""
    return module.count(".") > 1 and room(module) != "ghost_core.testing"


def rooms(edges: Graph) -> Graph:
    """Return which room imports which, whatever happens inside them."""
    found: Graph = {room(module): set() for module in edges}
    for module, targets in edges.items():
        found[room(module)] |= {room(target) for target in targets} - {room(module)}
    return found


def circle(edges: Graph) -> list[str]:
    """Return modules that import each other in a circle, if there is one."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def upwards(edges: Graph, floors: list[set[str]]) -> list[str]:
    """Return the imports between rooms that do not run from a floor to one below."""
    height = {name: at for at, floor in enumerate(floors) for name in floor}
    return [
        f"{source} imports {target}"
        for source, targets in rooms(edges).items()
        for target in targets
        if height[target.rpartition(".")[2]] >= height[source.rpartition(".")[2]]
    ]


def inside(name: str, tree: ast.AST, home: str) -> list[str]:
    """Return what a module imports from inside a wing other than `home`."""
    return [
        f"{name} imports {target}"
        for target in sorted(imports(tree))
        if target in MODULES and closed(target) and room(target) != home
    ]


def late(tree: ast.AST) -> set[str]:
    """Return what a module imports inside functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return {
        name
        for function in walk(tree)
        if isinstance(function, functions)
        for node in walk(function)
        for name in imported(node)
    }


def files_of_tests() -> dict[str, tuple[Path, str]]:
    """Return test files by their path, with the wing that each may look into."""
    found = {}
    for path in (path for folder in TESTS for path in (ROOT / folder).rglob("*.py")):
        if path.parent.name == "kit":
            continue  # what tests of several wings share
        match path.relative_to(ROOT).parts:
            case ["packages", package, "tests", wing, _, *_]:
                home = f"{package.replace('-', '_')}.{wing}"
            case _:
                home = ""
        found[str(path.relative_to(ROOT))] = path, home
    return found


def test_every_module_is_seen():
    assert {name.partition(".")[0] for name in MODULES} == set(PACKAGES)
    assert "ghost_core.algebra.factors" in graph(parsed())["ghost_core.algebra"]
    assert {name for floor in FLOORS for name in floor} == {
        room(name).rpartition(".")[2] for name in MODULES if room(name).startswith("ghost_core")
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    edges = graph({name: tree for name, tree in parsed().items() if name.startswith(package)})
    assert circle(edges) == []
    assert circle(rooms(edges)) == []


def test_wings_import_downwards_only():
    core = {name: tree for name, tree in parsed().items() if name.startswith("ghost_core")}
    assert upwards(graph(core), FLOORS) == []


def test_nobody_imports_from_inside_a_wing():
    found = [each for name, tree in parsed().items() for each in inside(name, tree, room(name))]
    assert "\n".join(found) == ""


def test_tests_import_from_inside_their_own_wing_only():
    found = [
        each
        for name, (path, home) in files_of_tests().items()
        for each in inside(name, ast.parse(path.read_text()), home)
    ]
    assert "\n".join(found) == ""


def test_nothing_is_imported_inside_a_function_for_the_order_of_imports():
    found = {name: names for name, tree in parsed().items() if (names := late(tree))}
    assert found == IMPORTED_WHERE_USED


def names_of_ghost() -> set[str]:
    """Return the private names that ghost defines itself."""
    nodes = [node for tree in parsed().values() for node in ast.walk(tree)]
    defined = {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    written = (each for each in nodes if isinstance(getattr(each, "ctx", None), ast.Store))
    return defined | {str(getattr(each, "attr", getattr(each, "id", ""))) for each in written}


def private(tree: ast.AST, own: set[str]) -> set[str]:
    """Return the private names of torch that a module uses, by attribute or by import.

    What is no attribute of torch is told by its name: nothing of ghost's is called so.
    """
    found = set()
    for node in walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                found.add(f"torch.{name}")
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("torch."):
                found |= {f"{module}.{each.name}" for each in names}
            case ast.Attribute(attr=name) if name not in own | NO_NAMES_OF_TORCH:
                found.add(f"something.{name}")
    return {
        name for name in found if re.search(r"\._[^_]", name) and not name.startswith(TOLD_TO_USE)
    }


def test_private_names_of_torch_are_used_in_one_room_and_by_what_sets_the_process():
    own = names_of_ghost()
    assert {
        room(each) for each, tree in parsed().items() if private(tree, own)
    } == USE_PRIVATE_NAMES
    assert private(ast.parse("x = value._base"), own) == {"something._base"}
    assert private(ast.parse("from torch.nn.modules import module as _module"), own) == set()


def test_no_file_is_longer_than_four_hundred_lines():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_table_of_files_says_what_the_modules_say():
    tool = runpy.run_path(str(ROOT / "tools/files_table.py"))
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith(("| `", "| **`"))]
    assert len(listed) >= len(MODULES) - len(PACKAGES)
    assert page == tool["with_table"](page), "run python tools/files_table.py"


def test_what_contributors_are_told_to_touch_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = page.partition("## Where things go")[2].partition("Imports run")[0]
    paths = re.findall(r"`([\w./-]+(?:\.py|\.md|/))`", told)
    there = [
        f"/{path.relative_to(ROOT).as_posix()}" for path in [*MODULES.values(), *ROOT.glob("*/*.*")]
    ]
    there += [f"{path.rpartition('/')[0]}/" for path in there]
    assert len(paths) >= 15
    assert [path for path in paths if not any(each.endswith(f"/{path}") for each in there)] == []


def test_the_rules_see_what_breaks_them():
    seeded = {
        "ghost_core.engine": "def f():\n    from ghost_core.testing import check_engine",
        "ghost_core.testing": "if TYPE_CHECKING:\n    import ghost_core.engine",
        "ghost_core.algebra": "from ghost_core.algebra.factors import Tokens",
        "ghost_core.split": "from ghost_core.algebra import factors",
        "ghost_core.batch": "import_module('ghost_core.split.axes')",
    }
    trees = {name: ast.parse(code) for name, code in seeded.items()}
    edges = graph(trees)
    assert set(circle(edges)) == {"ghost_core.engine", "ghost_core.testing"}
    assert upwards(edges, FLOORS) == ["ghost_core.engine imports ghost_core.testing"]
    assert late(trees["ghost_core.engine"]) == {"ghost_core.testing"}
    found = {name: inside(name, tree, room(name)) for name, tree in trees.items()}
    assert [name for name, each in found.items() if each] == [
        "ghost_core.split",
        "ghost_core.batch",
    ]


def nouns() -> set[str]:
    """Return the words of the glossary, as classes are named."""
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([a-z ,]+) \|", page, re.M)
    return {each.title().replace(" ", "") for word in words for each in word.split(", ")} - {"Word"}


def test_a_word_of_the_glossary_names_one_class_at_most():
    found: dict[str, list[str]] = {word: [] for word in nouns()}
    for name, tree in parsed().items():
        if not name.startswith("ghost_examples"):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.name in found:
                    found[node.name].append(name)
    assert sum(map(bool, found.values())) >= 20
    assert {word: names for word, names in found.items() if len(names) > 1} == {}


def test_classes_in_the_glossary_are_there():
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]\w+)`", page))
    nodes = [node for tree in parsed().values() for node in ast.walk(tree)]
    assert len(named) >= 10
    assert named <= {node.name for node in nodes if isinstance(node, ast.ClassDef)}
