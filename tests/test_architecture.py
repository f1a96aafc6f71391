"""docs/architecture.md names files that exist, in the layers that import-linter checks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def named() -> set[str]:
    """Paths in code spans, and those of the picture, which stand without their package."""
    spans = set(re.findall(r"`((?:encoder|state|streamer|tests|docs|deploy)/[\w./-]*|[\w-]+\.(?:md|toml))`", PAGE))
    (picture,) = re.findall(r"^```mermaid\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return spans | {f"streamer/{path}" for path in re.findall(r"\b[a-z_]+/[a-z_]+\.py", picture)}


def test_paths_named_exist() -> None:
    paths = named()
    assert {"streamer/service/loop.py", "streamer/kafka/consumer.py", "README.md"} <= paths
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", ["Detector._judge_windows", "Service.run", "Service._work", "Service._commit", "Kind"])
def test_code_named_exists(name: str) -> None:
    owner, _, method = name.rpartition(".")
    files = {"Detector": "streamer/detection/detector.py", "Service": "streamer/service/loop.py"}
    source = (ROOT / files.get(owner, "encoder/features/schema.py")).read_text()
    assert re.search(rf"^(    def )?{method}\b", source, re.MULTILINE)
    assert f"`{name}`" in PAGE or f"`{method}`" in PAGE


def test_layers_are_those_of_the_linter() -> None:
    """Each column of the table holds the layers of its package, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    expected = {each["containers"][0]: each["layers"] for each in contracts if each["type"] == "layers"}
    (table,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    heading, *rows = table.splitlines()
    starts = {package: heading.index(package) for package in heading.split()}
    ends = [*sorted(starts.values())[1:], None]
    for (package, start), end in zip(sorted(starts.items(), key=lambda item: item[1]), ends, strict=True):
        assert [cell for row in rows if (cell := row[start:end].strip())] == expected[package], package
