"""The `ripcurrent` command: settings as flags, and each subcommand as a thin door to what does the work.

Promises: an error that a user can meet is one line on stderr and exit code 1; help is quick, for nothing heavy is
imported before a command needs it. Does not contain any logic of the service.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import MutableMapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, cast

import orjson
import structlog
import typer

from streamer.cli import alert_commands, bundle_commands
from streamer.cli import dead_letter_commands as dlq_commands
from streamer.cli import file_commands as commands
from streamer.cli import replay_command as stream_commands
from streamer.cli.flags import takes_settings
from streamer.errors import ConfigurationError, RipcurrentError
from streamer.settings import Settings, leaves, shown, variable

GIVE_BACK_S = 60.0
"""How often memory that is free goes back to the system. It takes milliseconds."""

app = typer.Typer(
    name="ripcurrent",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Streaming anomaly detection for OCSF events on Kafka.\n\n"
        "Settings come from flags, else RIPCURRENT_* variables (--kafka-group-id is RIPCURRENT_KAFKA_GROUP_ID), else "
        "ripcurrent.toml (group_id in its section kafka), else defaults; `ripcurrent config` shows what they come to."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ripcurrent {installed_version('ripcurrent')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
    ),
) -> None:
    pass


for _command in (
    commands.fit,
    commands.score,
    commands.evaluate,
    commands.schema,
    commands.simulate,
    commands.demo,
    commands.gradients,
):
    app.command()(_command)
app.command()(stream_commands.replay)
for _command in (
    alert_commands.tail,
    alert_commands.explain,
    alert_commands.feedback,
    alert_commands.suppressions,
    alert_commands.report,
):
    app.command()(_command)
app.add_typer(dlq_commands.app)
app.add_typer(bundle_commands.app)


@app.command()
@takes_settings()
def run(
    settings: Settings,
    workers: Annotated[
        int,
        typer.Option(min=1, max=256, help="Processes that share the partitions; each has a metrics port of its own."),
    ] = 1,
) -> None:
    """Read events from Kafka, write alerts to Kafka, until SIGTERM.

    Progress is the group's committed offsets: start it again and it goes on where it was. Topics must exist. Secrets
    (kafka.sasl_password, kafka.ssl_key_password, redis.password) come from variables or the file, not from flags.
    """
    from streamer.service.workers import Workers

    configure_logging(settings)
    stop = threading.Event()
    watcher = Workers(settings, workers, serve) if workers > 1 else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watcher.stop if watcher is not None else lambda *_: stop.set())
    if watcher is None:
        serve(settings, stop)
    else:
        raise typer.Exit(watcher.run())


def serve(settings: Settings, stop: threading.Event) -> None:
    """The service, until `stop` is set. Raises ConfigurationError before anything is read, StreamError after."""
    configure_logging(settings)
    _check_bundle(settings)
    from streamer.cli.doctor import check_redis

    check_redis(settings)
    from streamer.bundles.manifest import read_manifest, resolve, verify
    from streamer.kafka.client import check_topics

    check_topics(settings)
    serving = resolve(settings.bundle)
    verify(serving)
    # Only now what takes seconds to import and load.
    from streamer.alerting.pipeline import open_episodes, open_findings
    from streamer.alerting.suppression_feed import open_feedback
    from streamer.alerting.threshold_ledger import Ledger
    from streamer.detection.detector import Detector, open_detector
    from streamer.kafka.client import claim_instance
    from streamer.service.bundle_rollout import Bundles, Opened
    from streamer.service.loop import Service
    from streamer.service.metric_collectors import BaselineCollector, DeviceCollector, DriftCollector

    episodes, feedback = open_episodes(settings), open_feedback(settings)

    def opening(path: Path) -> Opened:
        detector, windows = open_detector(settings, path)
        findings = open_findings(settings, detector, episodes, feedback)
        return Opened(detector.bundle.version, detector, findings, windows)

    first = opening(serving)
    instance = claim_instance(settings)
    rate = float(read_manifest(serving)["training"]["events_per_day"])
    line = settings.line if settings.line is not None else Ledger(settings, instance, rate)
    service = Service(
        settings,
        first.detector,
        first.alerting,
        line=line,
        windows=first.windows,
        instance=instance,
        bundles=Bundles(serving, opening),
    )
    service.metrics.bundle.labels(first.version).set(1)

    def serves() -> Detector:
        """Another one may the next moment."""
        return cast(Detector, service.detector)

    service.metrics.registry.register(DriftCollector(lambda: serves().drift))
    service.metrics.registry.register(DeviceCollector(lambda: serves().bundle.encoder.device))
    service.metrics.registry.register(BaselineCollector(lambda: serves().bundle.scorer.record.baseline))

    def follow() -> None:
        # glibc keeps what was freed between what is held: 45 to 80 MB of 850 came back each time, in 3 to 7 ms.
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
        while not stop.wait(GIVE_BACK_S):
            give_back(0)
        service.stop()

    threading.Thread(target=follow, name="stop", daemon=True).start()
    service.run()


@app.command()
@takes_settings()
def doctor(settings: Settings) -> None:
    """Check what the service needs (Kafka, topics, Redis, bundle), and say how it does if it runs.

    Ends with 1 if something is wrong, or if scores are not to be trusted.
    """
    from streamer.cli.doctor import examine

    worst = ""
    for finding in examine(settings):
        typer.echo(f"{finding.mark:<5}{finding.what:<10}{finding.told}")
        worst = "bad" if finding.mark == "bad" else worst
    raise typer.Exit(1 if worst else 0)


@app.command()
@takes_settings()
def config(
    settings: Settings,
    as_json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Print the effective settings, secrets hidden, with the variable that sets each."""
    effective = shown(settings)
    if as_json:
        typer.echo(orjson.dumps(effective, option=orjson.OPT_INDENT_2).decode())
        return
    section = ""
    for name, field in leaves():
        prefix, _, key = name.rpartition(".")
        if prefix != section:
            section = prefix
            typer.echo(f"\n[{section}]")
        value = effective[name]
        text = (
            "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
            if value is not None and (isinstance(value, dict))
            else _toml(value)
        )
        line = f"{key} = {text}" if value is not None else f"# {key} ="
        typer.echo(f"{line:<44} # {variable(name)}: {field.description}")


def _toml(value: Any) -> str:
    """A scalar or list as TOML: for these JSON is the same."""
    return orjson.dumps(value).decode()


def _check_bundle(settings: Settings) -> None:
    from streamer.bundles.manifest import resolve

    if not (resolve(settings.bundle) / "manifest.json").is_file():
        raise ConfigurationError(
            f"no bundle at {settings.bundle}; `ripcurrent fit FILES... --out {settings.bundle}` makes one"
        )


def configure_logging(settings: Settings) -> None:
    """Structured logs on stderr, as lines for people or as JSON."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _masked,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _masked(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What others say of an error may hold a secret, an address with its password."""
    from streamer.redaction import mask_text

    for name, value in entry.items():
        if isinstance(value, str):
            entry[name] = mask_text(value)
    return entry


def main() -> None:
    """Entry point: errors that a user can meet become one line and exit code 1."""
    # The network is small: a second thread gains it nothing, and where other programs want the cores too, threads that
    # wait for each other made training five times slower. One also gives the same bundle on any number of cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from encoder.ocsf.decoder import EncoderError
    from state.errors import StateError

    try:
        app()
    except (RipcurrentError, EncoderError, StateError) as error:
        print(f"ripcurrent: {error}", file=sys.stderr)
        sys.exit(1)
