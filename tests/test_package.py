"""What is installed is the three packages with the data that they read, and it works from anywhere.

The wheel is built from a copy of the source tree, because setuptools takes along whatever an earlier build left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("encoder", "state", "streamer")


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the three packages by its path, links followed."""
    found = [path for package in PACKAGES for path in (folder / package).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (*PACKAGES, "deploy", "docs", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, folder], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


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


def test_the_installed_command_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees the dependencies of this one, but not this checkout."""
    target, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    python = target / "bin" / "python"
    # pip of this environment, as a new one's own would take seconds to unpack.
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(target)}))
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # PYTHONPATH does not read .pth files, so an editable install of this checkout stays out of sight.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RIPCURRENT_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *sorted(dependencies)])

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = target / "bin" / "ripcurrent"
    assert run(command, "--version").startswith("ripcurrent 0.")
    shown = run(command, "--help")
    for name in ("fit", "run", "score", "evaluate", "simulate", "demo", "config", "schema", "gradients"):
        assert f" {name} " in shown
    where = "import encoder.ocsf.events, state.redis.client, streamer.devtools.servers as s; print(s.__file__)"
    assert run(python, "-c", where).startswith(str(site))
    pom = run(python, "-c", "from streamer.devtools import servers; print(servers._POM.read_text())")
    assert "kafka_2.13" in pom
