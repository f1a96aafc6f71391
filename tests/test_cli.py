"""The command explains itself quickly, shows what it would do, and says in one line what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from loop_harness import create

from streamer.service.logs import configure_logging
from streamer.settings import Settings, leaves

COMMAND = [sys.executable, "-c", "from streamer.cli.main import main; main()"]


def ripcurrent(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RIPCURRENT_")}
    environment = kept | {"COLUMNS": "200"} | variables
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def seconds_to_fail(tmp_path: Path) -> float:
    """What a command may take that only says what is wrong: 15 s, or on a machine that is busy as much longer as
    importing what the service imports takes longer than 3 s."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import streamer.detection.detector"], cwd=tmp_path, check=True)
    return 15 * max(1.0, (time.monotonic() - began) / 3)


def test_no_secret_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Settings())
    try:
        structlog.get_logger().warning("waiting", reason="no answer from redis://default:hunter2@redis:6379/0", times=3)
    finally:
        structlog.reset_defaults()
    told = capsys.readouterr().err
    assert "hunter2" not in told
    assert "redis://default:[masked]@redis:6379/0" in told


def test_help_names_every_setting_and_imports_nothing_heavy(tmp_path: Path) -> None:
    text = ripcurrent("run", "--help", cwd=tmp_path).stdout
    assert "Topics must exist. Secrets (kafka.sasl_password," in text
    for name, field in leaves():
        flag = "--" + name.replace(".", "-").replace("_", "-").replace("properties", "property")
        assert (flag in text) == ("password" not in name), flag
        assert (field.description or "").split()[0] in text
    program = (
        "import sys, streamer.cli.main; print([m for m in ('torch', 'confluent_kafka', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_version(tmp_path: Path) -> None:
    assert ripcurrent("--version", cwd=tmp_path).stdout.startswith("ripcurrent 0.")


def test_config_prints_toml_that_gives_the_same_settings_and_hides_secrets(tmp_path: Path) -> None:
    (tmp_path / "ripcurrent.toml").write_text("batch_size = 7\n[kafka]\nsasl_password = 'hunter2'\n")
    flags = ["--events", "a,b", "--kafka-property", "fetch.min.bytes=5", "--line", "0.001"]
    variables = {"RIPCURRENT_TENANT": "blue", "RIPCURRENT_REDIS_URL": "redis://me:hunter2@host/0"}
    done = ripcurrent("config", *flags, cwd=tmp_path, **variables)
    assert "hunter2" not in done.stdout
    shown = tomllib.loads(done.stdout)
    assert (shown["batch_size"], shown["events"], shown["tenant"], shown["threshold"]) == (7, ["a", "b"], "blue", 0.001)
    assert shown["kafka"]["properties"] == {"fetch.min.bytes": "5"}
    (tmp_path / "again.toml").write_text(done.stdout)
    (tmp_path / "ripcurrent.toml").unlink()
    again = ripcurrent("config", "--config", "again.toml", "--json", cwd=tmp_path)
    first = ripcurrent("config", *flags, "--json", "--batch-size", "7", cwd=tmp_path, **variables)
    assert json.loads(again.stdout) | {"kafka.sasl_password": ""} == json.loads(first.stdout)


def test_a_password_in_a_url_that_cannot_be_read_or_in_a_wrong_flag_is_not_repeated(tmp_path: Path) -> None:
    for command in ("config", "run", "doctor"):
        for variables in (
            {"RIPCURRENT_REDIS_URL": "redis://ripc:p@hunter:w/rd#hunter@localhost:6379/0"},
            {"RIPCURRENT_REDIS_URL": "redis://ripc:hunter2"},
            {"RIPCURRENT_KAFKA_PROPERTIES": '{"sasl.password": "hunter2'},
        ):
            done = ripcurrent(command, cwd=tmp_path, **variables)
            assert done.returncode == 1
            assert "hunter" not in done.stdout + done.stderr
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for flags in (["--kafka-property", "sasl.password:hunter2"], ["--redis-password=hunter2"]):
        done = ripcurrent("config", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert "hunter" not in done.stdout + done.stderr


LOGS = """
import sys, structlog
from streamer.service.logs import configure_logging
from streamer.settings import load
configure_logging(load({"log_format": sys.argv[1], "log_level": "warning"}))
structlog.get_logger("ripcurrent.service").warning("read again", reason="it was\\nlost", times=3)
structlog.get_logger("ripcurrent.service").info("not told")
"""


def test_logs_are_a_json_object_or_a_line_each() -> None:
    told = {}
    for kind in ("json", "console"):
        done = subprocess.run([sys.executable, "-c", LOGS, kind], capture_output=True, text=True, check=True)
        assert done.stdout == ""
        told[kind] = done.stderr.splitlines()
    (line,) = told["json"]
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {"event": "read again", "level": "warning", "reason": "it was\nlost", "times": 3}
    (line,) = told["console"]
    assert "read again" in line
    assert "times=3" in line


def test_wrong_settings_give_one_clear_line_within_seconds(
    tmp_path: Path, kafka: str, redis_url: str, unique: Callable[[str], str]
) -> None:
    topics = create(kafka, unique("cli"))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    servers = {"RIPCURRENT_KAFKA_BOOTSTRAP_SERVERS": kafka, "RIPCURRENT_REDIS_URL": redis_url}
    cases: list[tuple[list[str], dict[str, str], str]] = [
        ([], {"RIPCURRENT_BATCHSIZE": "1"}, "did you mean RIPCURRENT_BATCH_SIZE?"),
        (["--batch-size", "many"], {}, "setting batch_size = 'many'"),
        (["--bundle", "nowhere"], {}, "no bundle at nowhere"),
        (["--redis-url", "redis://127.0.0.1:1/0"], {}, "no Redis at redis://127.0.0.1:1/0 (redis.url)"),
        (["--kafka-bootstrap-servers", "127.0.0.1:1"], {}, "no Kafka answers at 127.0.0.1:1"),
        (["--events", topics.events, "--alerts", "no-such-topic"], {}, "no-such-topic"),
        (["--events", topics.events, "--alerts", topics.events], {}, "is both read and written"),
        (["--kafka-property", "no.such.property=1"], {}, "no.such.property"),
    ]
    limit_s = seconds_to_fail(tmp_path)
    for arguments, variables, message in cases:
        began = time.monotonic()
        done = ripcurrent("run", *arguments, cwd=tmp_path, **(servers | variables))
        assert time.monotonic() - began < limit_s
        assert done.returncode == 1, (arguments, done)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ripcurrent: ")
        assert message in last, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
