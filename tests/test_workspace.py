"""The promises the packages, the tools and the README make to each other."""

import ast
import os
import re
import subprocess
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ["ghost-core", "ghost-layers", "ghost-engines", "ghost-examples"]
PROJECTS = {
    package: tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    for package in PACKAGES
}
LICENSE = (ROOT / "LICENSE").read_text()
EVERYTHING = {"ghost_core", "ghost_layers", "ghost_engines", "ghost_examples", "transformers"}
MAY_IMPORT = {
    "ghost-core": {"ghost_core"},
    "ghost-layers": {"ghost_core", "ghost_layers"},
    "ghost-engines": {"ghost_core", "ghost_engines", "transformers"},
    "ghost-examples": EVERYTHING,
}
DEFAULT_SESSIONS = ["lint", "typecheck", "tests", "docs", "build", "wheels", "isolated"]
SESSIONS = {*DEFAULT_SESSIONS, "bench", "demo", "stress"}

# Paths that exist on one machine only: from the root (not after a name or a host), or a drive.
MACHINE_PATH = re.compile(
    rb"(?<![\w.~)}\]>-])/(?:work|opt|home|root|Users|mnt|scratch)/|\b[A-Z]:\\Users\\"
)


def source(package: str) -> Path:
    """Return the folder of a package's modules."""
    return ROOT / "packages" / package / "src" / package.replace("-", "_")


def imports(tree: ast.AST) -> set[str]:
    """Return the top-level modules that a module imports anywhere, by statement or by call."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                found.append(module)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                found.append(module)
    return {name.partition(".")[0] for name in found}


def decorator_name(node: ast.expr) -> str:
    """Return the dotted name of a decorator, without its arguments."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def readme_commands() -> list[str]:
    """Return the lines of README.md's code blocks that install and run nox."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "pip install nox" in line]


def test_tests_compute_on_one_thread():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"  # for the programs that tests start


def test_no_package_is_left_out():
    found = [path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")]
    assert sorted(found) == sorted(PACKAGES)


def test_versions_move_in_lockstep():
    assert len({project["version"] for project in PROJECTS.values()}) == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_siblings_are_pinned_to_the_shared_version(package):
    project = PROJECTS[package]
    extras = project.get("optional-dependencies", {}).values()
    siblings = [name for name in sum(extras, project["dependencies"]) if name.startswith("ghost-")]
    assert bool(siblings) == (package != "ghost-core")
    assert [name for name in siblings if not name.endswith(f"~={project['version']}")] == []


def test_engines_bring_the_layers_along():
    required = [re.split(r"[^\w-]", name)[0] for name in PROJECTS["ghost-engines"]["dependencies"]]
    assert "ghost-layers" in required


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_downwards(package):
    modules = sorted(source(package).rglob("*.py"))
    assert modules
    forbidden = EVERYTHING - MAY_IMPORT[package]
    upwards = {
        str(module.relative_to(ROOT)): sorted(found)
        for module in modules
        if (found := imports(ast.parse(module.read_text())) & forbidden)
    }
    assert upwards == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_not_code_is_installed_too(package):
    data = [
        path.relative_to(source(package))
        for path in source(package).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    ]
    assert Path("py.typed") in data
    installed = resources.files(package.replace("-", "_"))
    assert [str(path) for path in data if not installed.joinpath(*path.parts).is_file()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_license_is_installed_too(package):
    assert metadata.distribution(package).read_text("licenses/LICENSE") == LICENSE


def test_no_file_knows_the_machine_it_was_written_on():
    listing = subprocess.run(
        # The checkout may belong to another user, as it often does in a container.
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]
    assert ROOT / "pyproject.toml" in files
    found = {
        str(path.relative_to(ROOT)): match[0].decode()
        for path in files
        if (match := MACHINE_PATH.search(path.read_bytes()))
    }
    assert found == {}


def test_every_session_exists_and_has_a_help_text():
    sessions = {
        node.name: ast.get_docstring(node)
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
        and "nox.session" in map(decorator_name, node.decorator_list)
    }
    assert set(sessions) == SESSIONS
    assert [name for name, docstring in sessions.items() if not docstring] == []


def test_plain_nox_runs_the_default_sessions():
    options = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    assert ast.literal_eval(options["nox.options.sessions"]) == DEFAULT_SESSIONS


def test_ci_runs_the_commands_of_the_readme_and_every_session():
    listing = subprocess.run(
        ["bash", ".ci/run", "--list"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert set(readme_commands()) == {
        "python -m pip install nox && nox -s demo",
        "python -m pip install nox && nox -s tests",
    }
    assert set(readme_commands()) <= set(listing)
    run = [
        name
        for line in listing
        for name in line.partition("nox -s ")[2].partition(" -- ")[0].split()
    ]
    assert sorted(run) == sorted(SESSIONS)
