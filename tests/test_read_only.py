"""Where no file can be written, each command says so in one line before it works, or needs none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import COMMAND

READ_ONLY = "mount --make-rprivate / && mount -o remount,ro,bind / && "
READ_ONLY += "for place in /dev/shm /tmp /var/tmp /run; do mount -o remount,ro,bind $place 2>/dev/null; done; "
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def read_only(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command in a namespace of its own where every file system is read-only and there is no home directory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RIPCURRENT_")}
    script = READ_ONLY + 'touch nothing 2>/dev/null && exit 77; exec "$@"'
    words = [*NAMESPACE, "sh", "-c", script, "sh", *command]
    environment |= {"HOME": "/nonexistent"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("the file system stays writable")
    return done


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if subprocess.run([*NAMESPACE, "sh", "-c", READ_ONLY + "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not have a mount namespace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "events.ndjson"], "bundle cannot be written: "),
        (["fit", "events.ndjson", "--out", "/dev/null"], "no folder for temporary files"),
        (["score", "events.ndjson"], "scores.ndjson cannot be written: "),
        (
            ["score", "events.ndjson", "--out", "/dev/null", "--alerts", "alerts.ndjson"],
            "alerts.ndjson cannot be written",
        ),
        (["evaluate", "--train=events.ndjson", "--test=events.ndjson", "--labels=events.ndjson"], "set TMPDIR"),
        (["simulate"], "events.ndjson.gz"),
        (["bundle", "promote", "bundle", "--store", "store"], "bundle"),
    ],
)
def test_a_command_names_what_it_cannot_write(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "events.ndjson").write_text('{"class_uid": 3002}\n')
    done = read_only([*COMMAND, *arguments], tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_name_of_a_process_needs_a_lock_or_a_setting(tmp_path: Path) -> None:
    program = (
        "import sys; from streamer.errors import ConfigurationError; from streamer.settings import load\n"
        "from streamer.kafka.client import claim_instance\n"
        "try: print(claim_instance(load({'kafka.instance_id': sys.argv[1]})))\n"
        "except ConfigurationError as error: print(error)"
    )
    done = read_only([sys.executable, "-c", program, ""], tmp_path)
    assert "No usable temporary directory" in done.stdout
    assert "set kafka.instance_id" in done.stdout
    assert read_only([sys.executable, "-c", program, "pod-0"], tmp_path).stdout == "pod-0\n"
