"""Every setting of the service: its name, meaning and default, in one place.

A value comes from a flag, else from a `RIPCURRENT_*` variable, else from a TOML file, else from its default; a name
that is none of these is refused with the nearest one that is. Does not check that servers and topics exist: the service
does that when it starts.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from streamer.errors import ConfigurationError

PREFIX = "RIPCURRENT_"
DEFAULT_FILE = Path("ripcurrent.toml")
_NOT_SETTINGS = re.compile(r"RIPCURRENT_(TEST_.*|EVAL_DATA)")
_PUBLIC_PROPERTY = re.compile(r"(?!sasl|ssl)(?!.*(?:pass|pwd|secret|token|jaas|pem|cred|key|auth)).*", re.IGNORECASE)
"""Names of librdkafka properties whose values are shown. A name that is misspelled may still hold a secret."""
HIDDEN = "***"
MIN_SECRET = 3
"""Characters of a secret that is looked for in other texts: a shorter one stands in many words by chance."""
MIN_PART = 6
"""The same of a part of a value that lists several."""

FORMER_NAMES = {"line": "threshold"}
"""Names that settings had in earlier releases, and the names that they have now. Both are taken."""


class KafkaSettings(BaseModel):
    """How to reach Kafka, and as whom."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bootstrap_servers: str = Field(
        default="localhost:9092", repr=False, description="host:port of one or more brokers, comma-separated"
    )
    group_id: str = Field(
        default="ripcurrent", min_length=1, description="consumer group, whose committed offsets are the progress"
    )
    group_protocol: Literal["classic", "consumer"] = Field(
        default="classic", description="classic (cooperative-sticky, any broker) or consumer (KIP-848, Kafka 4)"
    )
    instance_id: str = Field(
        default="",
        description="name of this process, stable and unique in the group; empty: host name and a free slot on it",
    )
    security_protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        default="plaintext", description="plaintext, ssl, sasl_plaintext or sasl_ssl"
    )
    ssl_ca_location: str = Field(default="", description="PEM file of the authorities to trust; empty: the system's")
    ssl_certificate_location: str = Field(default="", description="PEM file of this client's certificate")
    ssl_key_location: str = Field(default="", description="PEM file of this client's private key")
    ssl_key_password: SecretStr = Field(default=SecretStr(""), description="password of the private key")
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER"] = Field(
        default="", description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, GSSAPI or OAUTHBEARER"
    )
    sasl_username: str = Field(default="", description="user name for PLAIN and SCRAM")
    sasl_password: SecretStr = Field(default=SecretStr(""), description="password for PLAIN and SCRAM")
    properties: dict[str, str] = Field(
        default={},
        repr=False,
        description="any other librdkafka property of consumer and producer, such as fetch.min.bytes",
    )

    @field_validator("bootstrap_servers")
    @classmethod
    def _no_user(cls, servers: str) -> str:
        if "@" in servers:
            raise ValueError("host:port is needed, without a user; kafka.sasl_username says who this is")
        return servers

    @field_validator("properties", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """TOML and JSON give numbers and booleans, librdkafka takes text; a nested table is a dotted key."""
        if not isinstance(value, Mapping):
            return value
        return {key: str(leaf).lower() if isinstance(leaf, bool) else str(leaf) for key, leaf in _flatten(value)}

    def connection(self) -> dict[str, str]:
        """librdkafka's properties that every client of this process shares: consumer, producer and admin."""
        typed = {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self.security_protocol,
            "ssl.ca.location": self.ssl_ca_location,
            "ssl.certificate.location": self.ssl_certificate_location,
            "ssl.key.location": self.ssl_key_location,
            "ssl.key.password": self.ssl_key_password.get_secret_value(),
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.sasl_username,
            "sasl.password": self.sasl_password.get_secret_value(),
        }
        return {key: value for key, value in typed.items() if value} | self.properties


class RedisSettings(BaseModel):
    """How to reach the Redis or Valkey that holds the windows, and how long to wait for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    url: str = Field(
        default="redis://localhost:6379/0", repr=False, description="redis://, rediss:// (TLS) or unix:// URL"
    )
    username: str = Field(default="", description="ACL user")
    password: SecretStr = Field(default=SecretStr(""), description="password of the ACL user, or of the server")
    tls_ca: str = Field(default="", description="PEM file of the authorities to trust; empty: the system's")
    tls_certificate: str = Field(default="", description="PEM file of this client's certificate")
    tls_key: str = Field(default="", description="PEM file of this client's private key")
    timeout_s: float = Field(default=5.0, gt=0, description="seconds to wait for a connection, and for an answer")
    retries: int = Field(
        default=3, ge=0, description="tries after the first, with exponential backoff of at most a second"
    )
    patience_s: float = Field(
        default=300.0,
        ge=0,
        description="seconds that the stream waits, paused, for a Redis that went away before it ends",
    )

    @field_validator("url")
    @classmethod
    def _can_be_read(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("a URL that starts with redis://, rediss:// or unix:// is needed")
        try:
            parts = urlsplit(url)
            readable = "@" not in parts.path + parts.query + parts.fragment and (parts.port is None or parts.port > 0)
        except ValueError:
            readable = False
        if not readable:
            raise ValueError(
                "not a URL that can be read; a password in it must be percent-encoded (@ as %40, / as %2F, # as %23), "
                "or be given in RIPCURRENT_REDIS_PASSWORD"
            )
        return url

    def client_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `redis.Redis.from_url(url, ...)`: who we are and whom we trust."""
        given: dict[str, Any] = {
            "username": self.username,
            "password": self.password.get_secret_value(),
            "ssl_ca_certs": self.tls_ca,
            "ssl_certfile": self.tls_certificate,
            "ssl_keyfile": self.tls_key,
        }
        return {key: value for key, value in given.items() if value}


class Settings(BaseSettings):
    """All settings. `load` reads them; nothing else in the project reads the environment for a setting."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    bundle: Path = Field(
        default=Path("bundle"), description="directory of the bundle that `ripcurrent fit` wrote, or a store of them"
    )
    shadow: Path | None = Field(
        default=None, description="bundle that scores beside the one that serves, to be compared; nothing is alerted"
    )
    tenant: str = Field(
        default="default", min_length=1, description="name that keeps this stream's windows apart in Redis"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")

    events: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("events",), min_length=1, description="topics to read, comma-separated"
    )
    alerts: str = Field(default="alerts", min_length=1, description="topic that alerts go to (OCSF Detection Finding)")
    dead_letters: str = Field(default="dead-letters", min_length=1, description="topic that unreadable messages go to")
    scores: str = Field(default="", description="topic that every event's p-value and severity go to; empty: none")

    feedback: str = Field(
        default="", description="topic of what analysts say of alerts, which may suppress more of the same; empty: none"
    )

    alerts_per_day: float = Field(
        default=20.0, gt=0, description="alert budget: how many a day normal traffic may cost"
    )
    ledger: str = Field(
        default="ledger",
        description="compacted topic of one partition that holds the alert thresholds and what was spent; "
        "needed unless threshold is set",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="fixed p-value to alert at or under, in place of the one that follows the budget",
    )

    redact: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="attributes whose values are masked whole in alerts, comma-separated: user.email_addr"
    )

    start: Literal["earliest", "latest"] = Field(
        default="latest", description="where a group without committed offsets begins: earliest or latest"
    )
    on_missing_offsets: Literal["stop", "continue"] = Field(
        default="stop", description="when committed offsets no longer exist: stop, or continue at the earliest that do"
    )
    delivery: Literal["exactly_once", "at_least_once"] = Field(
        default="exactly_once", description="exactly_once (Kafka transactions) or at_least_once"
    )
    batch_size: int = Field(default=2048, ge=1, le=100_000, description="messages scored together at most")
    linger_ms: int = Field(default=50, ge=1, le=60_000, description="milliseconds to wait for a full batch")
    batches_per_transaction: int = Field(default=8, ge=1, le=1000, description="batches committed together at most")
    transaction_latency_ms: int = Field(
        default=200,
        ge=0,
        le=30_000,
        description="milliseconds that a scored batch waits at most for its commit to begin",
    )

    metrics_address: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address that metrics_port is opened on; 0.0.0.0 (or ::): every interface",
    )
    metrics_port: int = Field(
        default=9108, ge=0, le=65535, description="port of /metrics, /healthz and /readyz; 0: none"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="console or json")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error"
    )

    kafka: KafkaSettings = Field(default=KafkaSettings(), description="connection to Kafka")
    redis: RedisSettings = Field(default=RedisSettings(), description="connection to Redis")

    @field_validator("events", "redact", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each setting's dotted name with its definition, in the order in which a person reads them."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def variable(name: str) -> str:
    """The environment variable of a setting: kafka.group_id -> RIPCURRENT_KAFKA_GROUP_ID."""
    return PREFIX + name.replace(".", "_").upper()


def is_secret(field: FieldInfo) -> bool:
    """Whether a setting is never shown and not taken as a flag."""
    return field.annotation is SecretStr or SecretStr in get_args(field.annotation)


def load(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """Settings from flags (by dotted name, None is not given), the environment, a TOML file and defaults.

    Args:
        flags: such as {"kafka.group_id": "blue", "threshold": 0.001}.
        config: the TOML file; None takes ./ripcurrent.toml where there is one.

    Raises:
        ConfigurationError: an unknown name, a value that cannot be, a file that cannot be read; in one line.
    """
    given = _by_current_names({key: value for key, value in (flags or {}).items() if value is not None}, "flags")
    _refuse_unknown(given, "flags")
    _refuse_unknown_variables()
    from_file = _by_current_names(_read_file(config), str(config or DEFAULT_FILE))
    from_former_variables = {
        new: os.environ[variable(old)] for old, new in FORMER_NAMES.items() if os.environ.get(variable(old))
    }

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            former = InitSettingsSource(settings_cls, from_former_variables)
            return init_settings, env_settings, former, InitSettingsSource(settings_cls, from_file)

    try:
        return Loaded(**_nest(given))
    except ValidationError as error:
        raise ConfigurationError("; ".join(_describe(problem) for problem in error.errors())) from None
    except ValueError as error:  # pydantic-settings: a variable that should hold JSON does not
        raise ConfigurationError(f"settings: {error}") from None


def shown(settings: Settings) -> dict[str, Any]:
    """Effective settings by dotted name as JSON values, secrets as '***' (also inside URLs and properties)."""
    dump = dict(_flatten(settings.model_dump(mode="json", exclude={"kafka": {"properties"}})))
    dump["kafka.properties"] = {
        key: value if _PUBLIC_PROPERTY.fullmatch(key) else HIDDEN for key, value in settings.kafka.properties.items()
    }
    dump["redis.url"] = without_password(settings.redis.url)
    for name, field in leaves():
        if is_secret(field):
            dump[name] = HIDDEN if dump[name] else ""
    return {name: dump[name] for name, _ in leaves()}


def without_password(url: str) -> str:
    """A URL as it may be shown. Everything before the last @ but a plain user name is hidden, and so are options."""
    before, at, place = url.rpartition("@")
    scheme, slashes, user = before.rpartition("://")
    name, colon, _ = user.partition(":")
    who = f"{name}:{HIDDEN}" if colon and re.fullmatch(r"[\w.-]*", name) else HIDDEN
    place, question, options = place.partition("?")
    if question and not re.fullmatch(r"db=\d+", options):
        options = HIDDEN
    return (f"{scheme}{slashes}{who}@" if at else "") + place + question + options


def secrets(settings: Settings) -> set[str]:
    """Every text that must appear in no output, in each spelling in which a client may repeat it in an error."""
    kafka, redis = settings.kafka, settings.redis
    found = {each.get_secret_value() for each in (kafka.ssl_key_password, kafka.sasl_password, redis.password)}
    for key, value in kafka.properties.items():
        if not _PUBLIC_PROPERTY.fullmatch(key):
            found |= {value, *(part for part in re.split(r"[\s=,;]+", value) if len(part) >= MIN_PART)}
    parts = urlsplit(redis.url)
    found |= {parts.password or parts.username or "", *(value for _, value in parse_qsl(parts.query))}
    found |= {unquote(text) for text in found}
    return {text for text in found if len(text) >= MIN_SECRET}


def hide(text: str, settings: Settings) -> str:
    """A text, such as a client's error, without the secrets of these settings."""
    text = text.replace(settings.redis.url, without_password(settings.redis.url))
    for secret in sorted(secrets(settings), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _by_current_names(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Former names as the current ones. Raises ConfigurationError where one setting has both."""
    for old, new in FORMER_NAMES.items():
        if old in given and new in given:
            raise ConfigurationError(f"{place}: {old!r} is the former name of {new!r}; give one of them")
    return {FORMER_NAMES.get(name, name): value for name, value in given.items()}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return tree


def _read_file(config: Path | None) -> dict[str, Any]:
    path = config if config is not None else DEFAULT_FILE
    if config is None and not path.exists():
        return {}
    try:
        tree = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    _refuse_unknown({name: None for name, _ in _flatten(tree)}, str(path))
    return tree


def _refuse_unknown_variables() -> None:
    known = {variable(name) for name, _ in leaves()} | {variable(name) for name in FORMER_NAMES}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known and not _NOT_SETTINGS.fullmatch(name):
            raise ConfigurationError(f"unknown setting {name} in the environment{_nearest(name, known)}")


def _refuse_unknown(names: Mapping[str, Any], place: str) -> None:
    known = {name for name, _ in leaves()}
    for name in names:
        if name not in known | FORMER_NAMES.keys() and not name.startswith("kafka.properties."):
            raise ConfigurationError(f"unknown setting {name!r} in {place}{_nearest(name, known)}")


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.6)
    if not near:  # a name given without its section, such as group_id
        near = [full for full in sorted(known) if full.rpartition(".")[2] == name]
    return f"; did you mean {near[0]}?" if near else "; `ripcurrent config` lists all of them"


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    # A value of which the model's own repr is silent may hold a secret, in particular when it cannot be read.
    secret = any(name.startswith(known) and (is_secret(field) or not field.repr) for known, field in leaves())
    value = "" if secret else f" = {problem['input']!r}"
    return f"setting {name}{value}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def device_of(settings: Settings) -> str:
    """cpu or cuda, also where the settings leave it open."""
    if settings.device != "auto":
        return settings.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
