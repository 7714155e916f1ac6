"""Every check the project runs, one session each. Their docstrings are what `nox --list` shows."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
# pip honours constraints.txt, which pins a build of torch without CUDA packages.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "tests", "docs", "build", "wheels", "isolated"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
SITE = ROOT / "site"
PACKAGES = ["ghost-core", "ghost-layers", "ghost-engines", "ghost-examples"]
PROJECT = nox.project.load_toml("pyproject.toml")
# Registries break off downloads, now and then more often than pip would go on with one.
PIP = {"PIP_RESUME_RETRIES": "20"}
PAUSES = [20, 60, 180]  # seconds before pip is run again


def install(session: nox.Session, *requirements: str, groups: Sequence[str] = ()) -> None:
    """Install requirements under the workspace constraints."""
    extra = nox.project.dependency_groups(PROJECT, *groups) if groups else ()
    # --no-compile: byte-compiling all of torch takes longer than installing it.
    arguments = ("--no-compile", "-c", str(ROOT / "constraints.txt"), *requirements, *extra)
    for pause in PAUSES:
        try:
            session.install(*arguments, env=PIP)
        except CommandFailed:
            session.warn(f"pip failed; once more in {pause} s, what it has downloaded is kept")
            time.sleep(pause)
        else:
            return
    session.install(*arguments, env=PIP)


def install_in_place(session: nox.Session, *groups: str) -> None:
    """Install every package so that it runs from its source."""
    # Built without isolation, four packages take one environment instead of five.
    install(session, "hatchling", "editables")
    install(
        session,
        "--no-build-isolation",
        *(f"-epackages/{package}" for package in PACKAGES),
        groups=groups,
    )


def run_tests(session: nox.Session, *arguments: str) -> None:
    """Run pytest with a process on each core. `-- -n 0` runs everything in one."""
    # Counted here: pytest-xdist counts cores that belong to others, too.
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    processes = min(cores, 8)  # each takes seconds to start and a gigabyte
    session.run(
        *("pytest", "--numprocesses=auto", "--dist=worksteal", *arguments, *session.posargs),
        env={
            "PYTEST_XDIST_AUTO_NUM_WORKERS": str(processes),
            # Where byte code is not kept, each of the many processes compiles all of torch.
            "PYTHONDONTWRITEBYTECODE": "",
        },
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting. Pass `-- --fix` to repair."""
    install(session, groups=["lint"])
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of every package."""
    install_in_place(session, "typecheck")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test but the stress tests, on the packages in place."""
    install_in_place(session, "test", "models", "tables")
    run_tests(session)


@nox.session
def stress(session: nox.Session) -> None:
    """Run the stress tests: many kills, many rows, long loops, other frameworks."""
    install_in_place(session, "test", "models", "tables", "frameworks")
    run_tests(session, "-m", "stress")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo and write its report. Everything after `--` goes to the demo."""
    install_in_place(session)
    session.run("python", "-m", "ghost_examples.demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what ghost costs: a table, JSON and a plot. `-- --list` names the cases."""
    install_in_place(session)
    session.run("python", "-m", "bench", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, or serve it: `nox -s docs -- serve`."""
    install(session, groups=["docs"])
    session.run(
        "mkdocs",
        *(session.posargs or ["build", "--strict"]),
        env={"NO_MKDOCS_2_WARNING": "1"},  # a banner about the end of mkdocs-material
    )
    if not session.posargs and (fetched := fetched_from_elsewhere()):
        session.error("the site must work offline, but fetches\n" + "\n".join(fetched))


def fetched_from_elsewhere() -> list[str]:
    """Return what pages and style sheets of the built site load from another host."""
    loads = re.compile(
        r"""<(?!a\b)[^<>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
        r"""|(?:@import\s*|url\()["'\s]*((?:https?:)?//[^"'\s)]+)"""
    )
    return [
        f"{file.relative_to(SITE)}: {match[1] or match[2]}"
        for kind in ("html", "css")
        for file in sorted(SITE.rglob(f"*.{kind}"))
        for match in loads.finditer(file.read_text(encoding="utf-8"))
    ]


@nox.session
def build(session: nox.Session) -> None:
    """Build every package into dist/, as a wheel and as an sdist."""
    install(session, "build", "hatchling", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        source = f"packages/{package}"
        session.run("python", "-m", "build", "--no-isolation", "--outdir=dist", source, silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))


# The next two start from a fresh environment each time: pip takes a rebuilt wheel of the same
# version for the one that is installed.


@nox.session(requires=["build"], reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """Install the built wheels and a third-party plugin, then test them together."""
    install(session, *map(str, sorted(DIST.glob("*.whl"))), groups=["test", "models", "tables"])
    install(session, "tests/plugins/ghost-plugin-sample")
    run_tests(session, "tests")


@nox.session(requires=["build"], reuse_venv=False)
@nox.parametrize("package", PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """Test one built package, installed with nothing but what it declares."""
    # A sibling that the package asks for is the one built here, whatever an index may offer.
    siblings = session.cache_dir / "siblings.txt"
    siblings.write_text(
        "".join(
            f"{wheel.name.split('-')[0].replace('_', '-')} @ {wheel.as_uri()}\n"
            for wheel in sorted(DIST.glob("*.whl"))
        )
    )
    install(session, "-c", str(siblings), package)
    # Once before pytest is there, which would bring pluggy and others along.
    session.run("python", "-c", f"import {package.replace('-', '_')}")
    install(session, groups=["test"])
    run_tests(session, f"packages/{package}")
