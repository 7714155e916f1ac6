"""Writes the table of files in docs/architecture.md from the first lines of the modules.

    python tools/files_table.py

Run it after adding, moving or renaming a module; a test compares.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START = "<!-- The table of files: written by tools/files_table.py -->\n"
END = "<!-- The end of the table of files -->\n"


def subject(path: Path) -> str:
    """Return the first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise SystemExit(f"{path} does not say what it is: give it a docstring")
    return docstring.splitlines()[0].replace("|", r"\|")


def rows(folder: Path, root: Path) -> list[str]:
    """Return a row for each module of a folder, then for each wing with its modules."""
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    found = [f"| `{path.relative_to(root).as_posix()}` | {subject(path)} |" for path in modules]
    for wing in sorted(path.parent for path in folder.glob("*/__init__.py")):
        name = wing.relative_to(root).as_posix()
        found.append(f"| **`{name}/`** | **{subject(wing / '__init__.py')}** |")
        found += rows(wing, root)
    return found


def table() -> str:
    """Return the table of all packages' files, as Markdown."""
    lines = []
    for name in ("ghost_core", "ghost_layers", "ghost_engines", "ghost_examples"):
        package = ROOT / "packages" / name.replace("_", "-") / "src" / name
        lines += [f"### {name}", "", subject(package / "__init__.py"), ""]
        lines += ["| file | subject |", "|---|---|", *rows(package, package), ""]
    return "\n".join(lines)


def with_table(page: str) -> str:
    """Return the page with the table as it has to be."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
