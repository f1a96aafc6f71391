"""The `ripcurrent` command: settings as flags, and each subcommand as a thin door to what does the work.

Promises: an error that a user can meet is one line on stderr and exit code 1; help is quick, for nothing heavy is
imported before a command needs it. Does not contain any logic of the service.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import orjson
import typer

from streamer.cli import alert_commands, bundle_commands, dead_letter_commands, file_commands, replay_command
from streamer.cli.flags import takes_settings
from streamer.errors import RipcurrentError
from streamer.service.logs import configure_logging
from streamer.service.startup import serve
from streamer.settings import Settings, hide, leaves, shown, variable

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
    file_commands.fit,
    file_commands.score,
    file_commands.evaluate,
    file_commands.schema,
    file_commands.simulate,
    file_commands.demo,
    file_commands.gradients,
):
    app.command()(_command)
app.command()(replay_command.replay)
for _command in (
    alert_commands.tail,
    alert_commands.explain,
    alert_commands.feedback,
    alert_commands.suppressions,
    alert_commands.report,
):
    app.command()(_command)
app.add_typer(dead_letter_commands.app)
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


@app.command()
@takes_settings()
def doctor(settings: Settings) -> None:
    """Check what the service needs (Kafka, topics, Redis, bundle), and say how it does if it runs.

    Ends with 1 if something is wrong, or if scores are not to be trusted.
    """
    from streamer.cli.doctor import examine

    worst = ""
    for finding in examine(settings):
        typer.echo(hide(f"{finding.mark:<5}{finding.what:<10}{finding.text}", settings))
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


def main() -> None:
    """Entry point: errors that a user can meet become one line and exit code 1."""
    # The network is small: a second thread gains it nothing, and where other programs want the cores too, threads that
    # wait for each other made training five times slower. One also gives the same bundle on any number of cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Nothing here runs in parallel by joblib, whose search for semaphores warns where no folder can be written to.
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")
    from encoder.ocsf.events import EncoderError
    from state.errors import StateError

    try:
        app()
    except (
        RipcurrentError,
        EncoderError,
        StateError,
        OSError,
    ) as error:  # OSError: a full disk, a folder without rights
        print(f"ripcurrent: {error}", file=sys.stderr)
        sys.exit(1)
