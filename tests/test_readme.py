"""What the README tells a newcomer to type is there: commands, flags, settings, make targets, links."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from streamer.cli.main import app
from streamer.settings import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def joined(block: str) -> list[str]:
    """The lines of a block, those that end in a backslash made one with the next."""
    return block.replace("\\\n", " ").splitlines()


def commands() -> dict[str, set[str]]:
    """Each subcommand with its flags."""
    group = typer.main.get_command(app)
    return {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def test_every_command_named_exists_with_the_flags_given_it() -> None:
    known = commands()
    lines = [line for page in PAGES for block in blocks("sh", page) for line in joined(block)]
    typed = [shlex.split(line, comments=True) for line in lines if line.startswith("ripcurrent ")]
    assert {words[1] for words in typed} >= {"fit", "run"}
    for words in typed:
        assert words[1] in known, words
        flags = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert flags <= known[words[1]] | {"--help"}, words
    for page in PAGES:
        for name in re.findall(r"`ripcurrent ([a-z]+)", page):
            assert name in known, name


def test_the_table_of_commands_is_whole() -> None:
    assert set(re.findall(r"^\| `ripcurrent ([a-z]+)", README, re.MULTILINE)) == set(commands())


def test_make_targets_named_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert named >= {"demo", "test"}
    for target in sorted(named):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_settings_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RIPCURRENT_EVAL_DATA", "RIPCURRENT_TEST_KAFKA", "RIPCURRENT_TEST_REDIS"):
        monkeypatch.delenv(name, raising=False)
    written = blocks("toml")
    assert written
    for text in written:
        path = tmp_path / "ripcurrent.toml"
        path.write_text(text)
        settings = load(config=path)
        for key, value in tomllib.loads(text).items():
            if not isinstance(value, dict):
                shown = settings.model_dump(mode="json")[key]
                assert (tuple(shown) if isinstance(shown, list) else shown) == (
                    tuple(value) if isinstance(value, list) else value
                )


def test_the_alert_shown_is_a_detection_finding() -> None:
    (alert,) = (json.loads(text) for text in blocks("json"))
    assert (alert["class_uid"], alert["type_uid"], alert["is_alert"]) == (2004, 200401, True)
    assert alert["finding_info"]["desc"].startswith("20")


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def every_test() -> dict[str, ast.FunctionDef]:
    """Every test of this folder, as `file.py::name`."""
    return {
        f"{path.name}::{node.name}": node
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows_of(table: str) -> list[str]:
    """The rows of Markdown tables, without header and rule."""
    return re.findall(r"^\| (?!fault |kind |---).*\|$", table, re.MULTILINE)


def test_each_promise_names_its_tests_and_they_exist() -> None:
    known = every_test()
    for page in PAGES:
        named = re.findall(r"`(test_\w+\.py::test_\w+)`", page)
        assert set(named) <= known.keys(), set(named) - known.keys()
    reliability = (ROOT / "docs/reliability.md").read_text()
    assert not re.findall(r"`test_\w+(?:\.\.\.)?`", README + reliability), "a test is named as `file.py::name`"
    faults = reliability.split("\n## ")[0]
    promises = README.split("## What it guarantees")[1].split("\nNot yet")[0]
    rows = rows_of(faults) + re.findall(r"^- .*(?:\n  .*)*", promises, re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        assert re.search(r"`test_\w+\.py::test_\w+`", row), f"no test is named for: {row}"


def test_a_test_that_not_every_change_runs_is_said_to_be_slow() -> None:
    known = every_test()
    for row in rows_of((ROOT / "docs/reliability.md").read_text()):
        for name, said in re.findall(r"`(test_\w+\.py::test_\w+)`( \(slow\))?", row):
            slow = any(ast.unparse(mark) == "pytest.mark.slow" for mark in known[name].decorator_list)
            assert slow == bool(said), name
