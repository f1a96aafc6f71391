"""Settings come from flags, variables, a file and defaults, in that order; what is unknown is refused by name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

import hypothesis
import pytest
from confluent_kafka import Producer
from hypothesis import given
from hypothesis import strategies as st

from streamer import settings as module
from streamer.errors import ConfigurationError
from streamer.kafka.client import build, client_properties
from streamer.service.logs import _masked
from streamer.service.startup import check_redis
from streamer.settings import Settings, hide, leaves, load, shown, variable


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("RIPCURRENT_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "ripcurrent.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def test_every_setting_has_a_default_and_a_description() -> None:
    assert all(not field.is_required() and field.description for _, field in leaves())
    assert load().model_dump() == Settings().model_dump()


def test_flags_win_over_variables_over_file_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    write('batch_size = 1\nlinger_ms = 1\ntenant = "file"\n[kafka]\ngroup_id = "file"\nbootstrap_servers = "file:1"\n')
    monkeypatch.setenv("RIPCURRENT_LINGER_MS", "2")
    monkeypatch.setenv("RIPCURRENT_TENANT", "variable")
    monkeypatch.setenv("RIPCURRENT_KAFKA_GROUP_ID", "variable")
    settings = load({"tenant": "flag", "bundle": None})
    assert (settings.batch_size, settings.linger_ms, settings.tenant) == (1, 2, "flag")
    assert (settings.kafka.group_id, settings.kafka.bootstrap_servers) == ("variable", "file:1")
    assert settings.alerts == "alerts"


def test_every_setting_can_be_given_as_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = {"events": "a, b", "kafka.properties": '{"fetch.min.bytes": 2}', "threshold": "0.01", "device": "cuda:1"}
    examples |= {"redis.url": "rediss://h/1", "kafka.sasl_mechanism": "PLAIN", "kafka.security_protocol": "ssl"}
    for name, field in leaves():
        value = examples.get(name, str(field.default.get_secret_value() if module.is_secret(field) else field.default))
        monkeypatch.setenv(variable(name), value or "something")
        if name in ("kafka.sasl_mechanism",):
            monkeypatch.setenv(variable(name), "PLAIN")
    settings = load()
    assert settings.events == ("a", "b")
    assert settings.kafka.properties == {"fetch.min.bytes": "2"}
    assert settings.kafka.sasl_password.get_secret_value() == "something"
    assert settings.threshold == 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", r"unknown setting 'batchsize' in ripcurrent.toml; did you mean batch_size\?"),
        ("[kafka]\nbootstrap_server = 'x'", r"'kafka.bootstrap_server'.*did you mean kafka.bootstrap_servers\?"),
        ("group_id = 'x'", r"did you mean kafka.group_id\?"),
        ("zzzz = 1", r"unknown setting 'zzzz' in ripcurrent.toml; `ripcurrent config` lists all"),
        ("batch_size = 0", r"setting batch_size = 0: input should be greater than or equal to 1"),
        ("delivery = 'twice'", r"setting delivery = 'twice': input should be 'exactly_once' or 'at_least_once'"),
        ("line = 2", r"setting threshold = 2"),
        ("[redis]\nurl = 'localhost'", r"setting redis.url: .*redis://"),
        ("[kafka]\nbootstrap_servers = 'me:word@host:9092'", r"setting kafka.bootstrap_servers: .*sasl_username"),
        ("batch_size = ", r"ripcurrent.toml is not TOML"),
        ("kafka = 'x'", r"kafka"),
        ("alerts_per_day = inf", r"setting alerts_per_day = inf: input should be a finite number"),
        ("[redis]\ntimeout_s = inf", r"setting redis.timeout_s = inf: input should be a finite number"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_key_and_way_out(text: str, message: str) -> None:
    write(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_a_file_may_come_from_windows() -> None:
    Path("ripcurrent.toml").write_bytes(b"\xef\xbb\xbfbatch_size = 7\r\n[kafka]\r\ngroup_id = 'blue'\r\n")
    assert (load().batch_size, load().kafka.group_id) == (7, "blue")


def test_an_unknown_variable_is_refused_and_the_tests_own_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIPCURRENT_TEST_KAFKA", "x")
    monkeypatch.setenv("RIPCURRENT_EVAL_DATA", "x")
    load()
    monkeypatch.setenv("RIPCURRENT_KAFKA_GROUPID", "x")
    with pytest.raises(ConfigurationError, match=r"RIPCURRENT_KAFKA_GROUPID .*did you mean RIPCURRENT_KAFKA_GROUP_ID"):
        load()


def test_a_named_file_must_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml cannot be read"):
        load(config=Path("nowhere.toml"))


def test_secrets_are_neither_shown_nor_printed() -> None:
    path = write(
        '[kafka]\nsasl_password = "hunter2"\n[kafka.properties]\n"ssl.keystore.password" = "hunter2"\n'
        '"fetch.min.bytes" = 9\nenable.metrics.push = false\n'
        '[redis]\nurl = "rediss://me:hunter2@host/0"\n',
        "other.toml",
    )
    settings = load(config=path)
    effective = shown(settings)
    assert "hunter2" not in str(effective) + repr(settings.kafka.sasl_password)
    assert effective["kafka.sasl_password"] == "***"
    assert effective["redis.url"] == "rediss://me:***@host/0"
    assert effective["kafka.properties"]["fetch.min.bytes"] == "9"
    assert set(effective) == {name for name, _ in leaves()}


SECRET = st.lists(st.text("ZQXJ", min_size=5, max_size=6), min_size=1, max_size=3).flatmap(
    lambda words: st.lists(
        st.sampled_from([*"@:/#?%&=[]!$ \\'\"+;,", "://", "%40"]), min_size=len(words) - 1, max_size=len(words) - 1
    ).map(lambda joints: "".join(a + b for a, b in zip(words, [*joints, ""], strict=True)))
)
"""Words that stand nowhere else, with what is special in URLs, TOML, JSON and shells between them."""


@hypothesis.settings(deadline=None)
@given(SECRET, st.sampled_from(["", "me", "me@corp"]), st.sampled_from(["", "?db=1", "?password={}", "?db={}"]))
def test_no_part_of_a_secret_appears_in_what_is_said_of_settings(secret: str, user: str, options: str) -> None:
    """Not in the effective settings, a refusal, an error of a client or a log line, whether or not the URL that holds
    the secret can be read."""
    words = re.findall("[ZQXJ]{5,}", secret)
    options = options.format(secret)
    said: list[str] = []
    for url in (f"redis://{user}:{secret}@127.0.0.1:1/0", f"rediss://{user}:{quote(secret, safe='')}@127.0.0.1:1/0"):
        for flags in (
            {"redis.url": url + options},
            {
                "redis.url": url,
                "redis.password": secret,
                "kafka.sasl_password": secret,
                "kafka.ssl_key_password": secret,
            },
            {"kafka.properties": {"sasl.pasword": secret, "ssl.key.pem": secret, "sasl.oauthbearer.config": secret}},
            {"kafka.bootstrap_servers": f"me:{secret}@127.0.0.1:1"},
        ):
            try:
                settings = load(flags)
            except ConfigurationError as error:
                said.append(str(error))
                continue
            said += [str(shown(settings)), repr(settings), hide(f"no {settings.redis.url} {secret}", settings)]
            said += [
                str(_masked(settings, None, "", {"reason": [f"a client says {settings.redis.url}", {"b": secret}]}))
            ]
            for check in (check_redis, lambda settings: build(Producer, client_properties(settings))):
                try:
                    check(settings)
                except ConfigurationError as error:
                    said.append(str(error))
    text = "\n".join(said)
    assert not [word for word in words if word in text], text


def test_a_password_that_is_not_percent_encoded_is_refused_with_the_way_out() -> None:
    for url in (
        "redis://ripc:p@ss:w/rd#1@localhost:6379/0",
        "redis://ripc:p/ss@localhost",
        "redis://a:b[c@localhost/0",
    ):
        with pytest.raises(ConfigurationError, match=r"percent-encoded .*RIPCURRENT_REDIS_PASSWORD") as caught:
            load({"redis.url": url})
        assert "localhost" not in str(caught.value)
    assert load({"redis.url": "redis://ripc:p@ss@localhost/0"}).redis.url.count("@") == 2


def test_tls_and_sasl_reach_librdkafka_and_redis() -> None:
    flags = {
        "kafka.security_protocol": "sasl_ssl",
        "kafka.sasl_mechanism": "SCRAM-SHA-512",
        "kafka.sasl_username": "me",
        "kafka.sasl_password": "secret",
        "kafka.ssl_ca_location": "/ca.pem",
        "kafka.properties": {"enable.metrics.push": False, "fetch": {"min": {"bytes": 3}}},
        "redis.username": "acl",
        "redis.tls_ca": "/ca.pem",
    }
    settings = load(flags)
    assert settings.kafka.connection() == {
        "bootstrap.servers": "localhost:9092",
        "security.protocol": "sasl_ssl",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "me",
        "sasl.password": "secret",
        "ssl.ca.location": "/ca.pem",
        "enable.metrics.push": "false",
        "fetch.min.bytes": "3",
    }
    assert settings.redis.client_arguments() == {"username": "acl", "ssl_ca_certs": "/ca.pem"}


def test_the_former_name_of_a_setting_still_works_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "r.toml"
    file.write_text("line = 0.01\n")
    assert load({"line": 0.02}).threshold == 0.02
    assert load({}, file).threshold == 0.01
    monkeypatch.setenv("RIPCURRENT_LINE", "0.03")
    assert load({}, file).threshold == 0.03
    monkeypatch.setenv("RIPCURRENT_THRESHOLD", "0.04")
    assert load({}, file).threshold == 0.04
    assert load({"line": 0.02}, file).threshold == 0.02


def test_both_names_of_one_setting_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'line' is the former name of 'threshold'"):
        load({"line": 0.02, "threshold": 0.03})
