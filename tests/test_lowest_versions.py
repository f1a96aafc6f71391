"""The lowest versions of the dependencies that pyproject.toml allows are those that it works with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lower_bounds() -> list[str]:
    """Every dependency, and those of the tests, at its lowest version: `redis[hiredis]==5.3`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("demo", "plots", "test")]
    wanted = [*project["dependencies"], *(each for extra in extras for each in extra)]
    return [each.replace(" ", "").replace(">=", "==") for each in wanted if not each.startswith("ripcurrent")]


def test_every_dependency_has_one_lower_bound_and_nothing_else() -> None:
    assert [each for each in lower_bounds() if not re.fullmatch(r"[\w-]+(\[\w+\])?==[\d.]+", each)] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_works_with_the_lowest_versions_that_it_allows(tmp_path: Path) -> None:
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *lower_bounds()], check=True)
    # What touches each dependency: the command, Redis, Kafka, files, networks, indexes.
    names = ("cli", "settings", "event_files", "redis_windows", "kafka_edges", "training", "baseline", "end_to_end")
    tests = [f"tests/test_{name}.py" for name in names]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--deselect", "tests/test_cli.py::test_version"]
    assert subprocess.run([*command, *tests], cwd=ROOT, env=environment, check=False).returncode == 0
