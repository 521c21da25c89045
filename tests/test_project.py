"""The project as its users meet it: it installs with its helpers, imports fast, and needs no optional package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from architecture_rules import OPTIONAL_PACKAGES, product_sources

REPOSITORY = Path(__file__).resolve().parent.parent

IMPORT_EVERYTHING = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import torch
print(json.dumps({"modules": sorted({m.split(".")[0] for m in sys.modules}), "cuda": torch.cuda.is_initialized()}))
"""


def run_python(*arguments: str, cwd: Path) -> str:
    """Isolated from the environment and from the present folder (-I), as an installed package is used."""
    run = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_importing_every_module_needs_neither_a_gpu_nor_an_optional_package(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    names = [source.module for source in product_sources(REPOSITORY) if source.module.startswith("megatron")]
    start = time.monotonic()
    seen = json.loads(run_python("-I", "-c", IMPORT_EVERYTHING, json.dumps(names), cwd=tmp_path))
    record_property("measured", f"all of megatron imported in a fresh process in {time.monotonic() - start:.2f} s")
    assert not OPTIONAL_PACKAGES & set(seen["modules"])
    assert not seen["cuda"]


def test_the_helpers_are_part_of_the_installed_package(tmp_path: Path) -> None:
    run_python("-I", "-c", "import megatron.data.helpers", cwd=tmp_path)


def test_installing_the_project_brings_the_helpers_to_the_package_and_to_the_source_tree(tmp_path: Path) -> None:
    """The scripts at the top of the repository import megatron from beside them, so both places need the helpers."""
    copy, target = tmp_path / "repository", tmp_path / "site"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "megatron", copy / "megatron", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    run_python("-m", "pip", "install", *options, str(copy), cwd=tmp_path)
    show_origin = "import sys; sys.path.insert(0, sys.argv[1]); import megatron.data.helpers as h; print(h.__file__)"
    for place in (target, copy):
        origin = run_python("-I", "-c", show_origin, str(place), cwd=tmp_path)
        assert Path(origin.strip()).is_relative_to(place)


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_states_the_command(command: str) -> None:
    assert command in (REPOSITORY / "README.md").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text().splitlines()
