"""What the README tells a newcomer to type is there: commands, flags, settings, make targets, links."""

from __future__ import annotations

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
