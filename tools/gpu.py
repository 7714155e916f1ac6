"""Runs the layer table, the zoo, every mode and the benchmarks on a GPU, from a plain checkout.

    python tools/gpu.py [--device cuda] [--no-bench] [--out DIR] [pytest arguments]

Nothing is installed: torch, numpy, pluggy, safetensors, transformers and pytest must be there. What
needs more, such as peft or xxhash, is left out by name. The plugins of this checkout are made known
for the time of the run. Exits with 2 if there is no such device: then nothing was checked. On the
CPU a few tests show that they work; `--device cpu:0` runs all of them there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted((ROOT / "packages").iterdir())


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All else goes to pytest."
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda, cuda:1, ...; cpu tries the command, cpu:0 runs all there",
    )
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmarks out")
    parser.add_argument("--out", type=Path, help="where the benchmarks write what they found")
    options, rest = parser.parse_known_args()
    if reason := why_not(options.device):
        print(f"nothing was checked: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as installed:
        declare(Path(installed))
        sources = [str(package / "src") for package in PACKAGES]
        paths = [installed, *sources, str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "GHOST_TEST_DEVICE": options.device,
        }
        tests = [
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-o",
            "addopts=--import-mode=importlib",
            "tests/device",
        ]
        failed = run([*tests, *rest], env)
        if not options.no_bench:
            out = ["--out", str(options.out)] if options.out else []
            failed |= run(["-m", "bench", "--device", options.device, *out], env)
    return int(failed)


def why_not(device: str) -> str | None:
    """Return why nothing can run on a device, or None."""
    import torch

    try:
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return f"there is no device {device!r} here ({str(error).splitlines()[0]})"
    print(f"torch {torch.__version__}, {device}", end="")
    if torch.device(device).type == "cuda":
        print(f": {torch.cuda.get_device_name(device)}", end="")
    print(flush=True)
    return None


def declare(folder: Path) -> None:
    """Write what an installation would tell of each package: its version and entry points."""
    for package in PACKAGES:
        project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        name = project["name"]
        info = folder / f"{name.replace('-', '_')}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        lines = []
        for group, entries in project.get("entry-points", {}).items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(arguments: list[str], env: dict[str, str]) -> bool:
    """Run Python in the checkout; return whether it failed."""
    print("$ python", *arguments, flush=True)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
