"""What is installed is the three packages with the data that they read, and it works from anywhere.

The source distribution is built from a copy of the source tree, because setuptools takes along whatever an earlier
build left behind. The environment that the wheel is installed into is empty but for the dependencies of this one: to
fetch torch again, several GB, for each test run would prove little more. That every dependency is declared is a test of
its own.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("encoder", "state", "streamer")


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the three packages by its path, links followed."""
    found = [path for package in PACKAGES for path in (folder / package).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.suffix != ".pyc"}


def setuptools_build(what: str, out: Path, tree: Path) -> Path:
    """`what` is build_wheel or build_sdist; the file that it makes of a source tree."""
    build = f"import sys; from setuptools import build_meta; print(build_meta.{what}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (*PACKAGES, "deploy", "docs", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    with tarfile.open(setuptools_build("build_sdist", folder, tree)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as pip and `python -m build` do."""
    return setuptools_build("build_wheel", tmp_path_factory.mktemp("wheel"), sdist)


def test_the_source_distribution_holds_what_the_wheel_is_built_from(sdist: Path) -> None:
    assert files(sdist) == files(ROOT)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_wheel_holds_the_three_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith("ripcurrent-")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files(ROOT)
    for name in (
        "encoder/py.typed",
        "state/py.typed",
        "streamer/py.typed",
        "state/redis/windows.lua",
        "state/redis/episodes.lua",
        "streamer/alerting/alert.schema.json",
    ):
        assert name in held
    assert held["streamer/devtools/kafka-pom.xml"] == (ROOT / "deploy/kafka/pom.xml").read_bytes()
    assert b"kafka_2.13" in held["streamer/devtools/kafka-pom.xml"]


def test_the_wheel_names_its_license_its_command_and_its_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(inside["METADATA"]).decode()
        assert archive.read(inside["entry_points.txt"]).decode().split("\n")[1] == "ripcurrent = streamer.cli.main:main"
        assert sorted(archive.read(inside["top_level.txt"]).decode().split()) == sorted(PACKAGES)
    for line in ("Name: ripcurrent", "Requires-Python: >=3.11", "License-Expression: Apache-2.0"):
        assert line in metadata.splitlines()
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra:")}
    assert extras == {"demo", "dev", "plots", "test"}
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert all(">=" in line or line.startswith("Requires-Dist: ripcurrent[") for line in required), required


def modules_imported() -> set[str]:
    """The top-level modules of other distributions that the packages import, anywhere."""
    found: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found - set(PACKAGES) - sys.stdlib_module_names


def test_every_module_that_is_imported_belongs_to_a_declared_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    used = r"^Requires-Dist: ([\w.-]+)(?:\[.*\])?>=[\d.]+(?:; extra == \"(?:demo|plots)\")?$"
    declared = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(used, metadata, re.MULTILINE)}
    providers = packages_distributions()
    for module in modules_imported():
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in providers.get(module, [module])}
        assert names & declared, f"{module}, of {names}, is imported and not declared"


@dataclass
class Installed:
    """The wheel in an environment of its own, which sees the dependencies of this one but not this checkout."""

    bin: Path
    site: Path
    variables: dict[str, str]
    elsewhere: Path

    def run(self, *words: str | Path, timeout_s: float = 60) -> str:
        """What a command prints, run from a directory that has nothing to do with the checkout."""
        done = subprocess.run(
            words,
            cwd=self.elsewhere,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    target, elsewhere = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    # pip of this environment, as a new one's own would take seconds to unpack.
    install = [sys.executable, "-m", "pip", "--python", target / "bin" / "python", "install"]
    subprocess.run([*install, "--no-deps", "--no-index", "--quiet", wheel], check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(target)}))
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    kept = {"RIPCURRENT_TEST_KAFKA", "RIPCURRENT_TEST_REDIS"}
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("RIPCURRENT_") or name in kept
    }
    # PYTHONPATH does not read .pth files, so an editable install of this checkout stays out of sight.
    variables["PYTHONPATH"] = os.pathsep.join([str(site), *sorted(dependencies)])
    return Installed(target / "bin", site, variables, elsewhere)


def test_the_installed_command_works_from_another_directory(installed: Installed) -> None:
    command, python = installed.bin / "ripcurrent", installed.bin / "python"
    assert installed.run(command, "--version").startswith("ripcurrent 0.")
    shown = installed.run(command, "--help")
    for name in ("fit", "run", "score", "evaluate", "simulate", "demo", "config", "schema", "gradients"):
        assert f" {name} " in shown
    every_module = (
        "import pkgutil, importlib, encoder, state, streamer\n"
        "for p in (encoder, state, streamer):\n"
        "    for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "        print(importlib.import_module(m.name).__file__)\n"
    )
    places = installed.run(python, "-c", every_module).split()
    assert len(places) > 100
    assert all(place.startswith(str(installed.site)) for place in places)


def test_a_file_is_simulated_and_scored_by_the_installed_command(installed: Installed, folder: Path) -> None:
    command = installed.bin / "ripcurrent"
    installed.run(command, "simulate", "--days", "1", "--events-per-day", "200", "--out", "day.ndjson")
    installed.run(command, "score", "day.ndjson", "--bundle", folder / "bundle", "--out", "scores.ndjson")
    events = (installed.elsewhere / "day.ndjson").read_bytes().splitlines()
    scores = (installed.elsewhere / "scores.ndjson").read_bytes().splitlines()
    assert len(scores) == len(events) > 100


DEMO = """
import sys
import encoder.training.replaced_fields, encoder.training.sequence
encoder.training.replaced_fields.STEPS = encoder.training.sequence.STEPS = 30
if len(sys.argv) > 1:
    from streamer.cli.main import main
    main()
else:
    from streamer.devtools.demo import demo
    sys.exit(demo(events_per_day=400, seconds=2, command=(sys.executable, __file__)))
"""
"""The demo of a small company with a short training; with arguments it is the command that the demo starts."""


@pytest.mark.extended
def test_the_demo_runs_from_the_installed_wheel(installed: Installed) -> None:
    """simulate, fit, Kafka and Valkey, run."""
    program = installed.elsewhere / "demo.py"
    program.write_text(DEMO)
    said = installed.run(installed.bin / "python", program, timeout_s=240)
    assert "$ ripcurrent fit" in said
    assert "incidents found" in said
    assert "throughput" in said
