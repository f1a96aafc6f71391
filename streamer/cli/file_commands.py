"""The commands that need no running service: fit, score, evaluate, schema, simulate, demo."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from streamer.cli.flags import From, Last, To, ends_of, takes_settings
from streamer.errors import ConfigurationError
from streamer.settings import Settings

if TYPE_CHECKING:
    from encoder.ocsf.events import Message
    from streamer.event_files import Reread, Unread
    from streamer.training.history import StageProgress

BUNDLE = Path("bundle")
EVENTS = "Events: NDJSON, plain or behind gzip or zstd, or Parquet; - is standard input."
Files = Annotated[list[Path], typer.Argument(help=EVENTS, show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of everything random: the same seed gives the same bundle.")]
Device = Annotated[str, typer.Option(help="Where the network runs: cpu, cuda, cuda:1.")]


@contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Progress bars on stderr, a bar a stage; a line a stage where stderr is no terminal."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.fields[note]:<24}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=None, note=note)
                if not sys.stderr.isatty():
                    console.print(f"{stage} ...", highlight=False)
            bars.update(tasks[stage], completed=done, total=total or None, note=note)

        yield show


@takes_settings("redact", "kafka")
def fit(
    settings: Settings,
    files: Annotated[list[Path] | None, typer.Argument(help=EVENTS, show_default=False)] = None,
    topic: Annotated[
        str | None, typer.Option(help="A topic to read events from, in place of files.", show_default="none")
    ] = None,
    since: From = None,
    until: To = None,
    last: Last = None,
    out: Annotated[Path, typer.Option(help="Where the bundle goes; a bundle that is there is replaced.")] = BUNDLE,
    seed: Seed = 0,
    device: Device = "cpu",
    picture: Annotated[
        Path | None, typer.Option(help="Also draw loss curves and checks of the embedding (PNG).", show_default="none")
    ] = None,
) -> None:
    """Learn what is normal from events without labels, and write a bundle.

    A day or more of ordinary traffic makes a good start; a few percent of attacks in it cost little. The latest 15 % of
    the events, by their time, calibrate the p-values and are learned from in no other way.
    """
    from rich.console import Console
    from rich.table import Table

    from streamer.event_files import readable_again
    from streamer.training import fit as fitting

    starts, ends = ends_of(since, until, last)
    if bool(files) == bool(topic) or (files and (starts or ends)):
        raise ConfigurationError("events come from files, or from --topic with --from, --to or --last")
    _must_be_writable(out, picture, scratch=True)
    with readable_again(files or []) as paths, progress_bars() as progress:
        source = _range(settings.model_copy(update={"events": (topic,)}), starts, ends) if topic else paths
        fitted = fitting.fit(source, out, seed=seed, device=device, redact=settings.redact, progress=progress)
    if picture is not None:
        from streamer.cli.plots import plot_training

        plot_training(picture, fitted.bundle.manifest["training"])
    table = Table(show_header=False, box=None)
    for what, value in fitting.summary(fitted):
        table.add_row(f"[bold]{what}[/bold]", str(value))
    Console().print(table)
    _report(fitted.unread)


MOST_LOWERED = 5
"""Lines about what counts for less, of one file."""


def _range(settings: Settings, since: list[str], until: list[str]) -> Reread:
    """A frozen range of a topic, to be read as often as it takes."""
    from streamer.kafka.consumer import message_of
    from streamer.kafka.offset_ranges import freeze
    from streamer.kafka.range_reader import RangeReader

    wanted = freeze(settings, since, until, int(time.time() * 1000))

    def read() -> Iterator[list[Message]]:
        with RangeReader(settings, wanted, message_of) as reader:
            yield from reader.batches(settings.batch_size)

    return read


@takes_settings("redact")
def score(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help=EVENTS, show_default=False)],
    bundle: Annotated[Path, typer.Option(help="The bundle to score with.")] = BUNDLE,
    out: Annotated[Path, typer.Option(help="Where the scores go: a JSON line an event.")] = Path("scores.ndjson"),
    findings: Annotated[
        Path | None,
        typer.Option("--alerts", help="Also write there what the service would publish.", show_default="none"),
    ] = None,
    alerts_per_day: Annotated[float, typer.Option(help="Alerts a day to spend; a FILE of less counts as a day.")] = 20,
    device: Device = "cpu",
) -> None:
    """Score a file of events, without servers.

    Each line of the output has uid (metadata.uid, else the line), p_value (how often a normal event is as unusual),
    severity (0 to 100), alert (true or false), entity and cause. With --alerts, also the findings: one alert for
    each episode, its updates and its close, as on the alert topic.
    """
    from encoder.ocsf.repairs import widespread
    from streamer.alerting.file_thresholds import thresholds_of
    from streamer.alerting.text import moment
    from streamer.bundles.bundle_files import load
    from streamer.detection.score_files import score_files
    from streamer.event_files import FileError, readable_again
    from streamer.offline.file_output import write_alerts, write_scores

    _must_be_writable(out, findings)
    with readable_again([file]) as paths:
        opened = load(bundle, device)
        with progress_bars() as progress:
            scored = score_files(paths, opened, lambda done: progress("score", done, 0, f"{done:,} events"))
        if not len(scored):
            reason = f"; {scored.unread}" if scored.unread else ""
            raise FileError(f"{file}: no event could be read, one JSON object a line is needed{reason}")
        thresholds = thresholds_of(scored, alerts_per_day, opened)
        alerts = write_scores(scored, thresholds, out)
        typer.echo(f"{len(scored):,} events, {alerts:,} alerts, scores in {out}")
        if findings is not None:
            with progress_bars() as progress:
                episodes = write_alerts(
                    paths,
                    opened,
                    scored,
                    thresholds,
                    findings,
                    lambda done: progress("alerts", done, 0, f"{done:,} events"),
                    settings.redact,
                )
            typer.echo(f"{episodes:,} episodes in {findings}")
    for each in scored.lowered[:MOST_LOWERED]:
        typer.echo(f"counts for less since {moment(each.since)}: {each}", err=True)
    if found := widespread(scored.repairs, len(scored)):
        shares = ", ".join(f"{kind} in {share:.0%} of the events" for kind, share in found.items())
        typer.echo(f"warning: {shares}: look at what the senders write", err=True)
    _report(scored.unread)


def evaluate(
    train: Annotated[list[Path], typer.Option(help="Events to fit on, taken as normal. May be given again.")],
    test: Annotated[list[Path], typer.Option(help="Events to score. May be given again.")],
    labels: Annotated[Path, typer.Option(help="CSV with the columns uid, label (0 or 1) and, if any, sequence.")],
    json: Annotated[Path | None, typer.Option(help="Also write the figures there.", show_default="none")] = None,
    seed: Seed = 0,
) -> None:
    """Measure against labels, beside the simple detectors that one would pick instead.

    Only the evaluator opens the labels; fitting and scoring never see them. The test file counts as one day.
    """
    from rich.console import Console

    from streamer.event_files import Unread, readable_again
    from streamer.offline.evaluation import evaluate as run
    from streamer.offline.evaluation import results_table
    from streamer.offline.file_output import detect

    _must_be_writable(json, scratch=True)
    with (
        readable_again([*train, *test, labels]) as paths,
        tempfile.TemporaryDirectory() as folder,
        progress_bars() as progress,
    ):
        results = run(
            paths[: len(train)],
            paths[len(train) : -1],
            paths[-1],
            seed=seed,
            detect=lambda a, b: detect(a, b, Path(folder) / "bundle", seed=seed, progress=progress),
            say=lambda text: progress("peers", 0, 0, text[:60]),
            unread=(unread := Unread()),
        )
    _report(unread)
    Console().print(results_table(results, title=", ".join(path.name for path in test)))
    if json is not None:
        json.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))


def schema(bundle: Annotated[Path, typer.Argument(help="The bundle to read.")] = BUNDLE) -> None:
    """Print the feature schema of a bundle: what each attribute is read as, and what was set aside and why."""
    from rich.console import Console

    from encoder.features.schema import Schema
    from streamer.bundles.manifest import read_manifest, resolve
    from streamer.cli.schema_table import schema_table

    read_manifest(bundle)
    bundle = resolve(bundle)
    Console().print(schema_table(Schema.from_json((bundle / "schema.json").read_bytes(), str(bundle / "schema.json"))))


def gradients(
    out: Annotated[Path, typer.Option(help="Where the picture goes (PNG).")] = Path("gradients.png"),
    seed: Seed = 0,
) -> None:
    """Plot the gradient at each layer of a plain and of a residual stack: why the network is residual."""
    from streamer.cli.plots import plot_gradients

    plot_gradients(out, seed=seed)
    typer.echo(f"picture in {out}")


def simulate(
    out: Annotated[Path, typer.Option(help="Where the events go (.gz: compressed).")] = Path("events.ndjson.gz"),
    labels: Annotated[Path | None, typer.Option(help="Where the labels go.", show_default="none")] = None,
    days: Annotated[int, typer.Option(help="Days to simulate, from a Monday on.")] = 8,
    events_per_day: Annotated[int, typer.Option(help="Events on a working day.")] = 18_000,
    clean: Annotated[int, typer.Option(help="Days without incidents; every kind comes on each working day after.")] = 7,
    seed: Seed = 0,
) -> None:
    """Make up the events of a company: people, hosts, services and, after some clean days, labelled incidents."""
    from streamer.devtools.simulator.generator import schedule, write
    from streamer.devtools.simulator.generator import simulate as run

    planned = run(seed=seed, days=days, events_per_day=events_per_day, incidents=schedule(days, clean=clean))
    written = write(planned, out, labels)
    typer.echo(f"{written:,} events in {out}" + (f", labels in {labels}" if labels else ""))


def demo(seed: Seed = 0) -> None:
    """Show it all on this machine: start Kafka and Valkey, simulate a week, fit, stream a day, count what was found.

    Needs Java 17 and Maven for Kafka, or RIPCURRENT_TEST_KAFKA with the address of one that runs.
    """
    from streamer.devtools.demo import demo as run

    raise typer.Exit(run(seed=seed))


def _report(unread: Unread) -> None:
    if unread:
        typer.echo(str(unread), err=True)


def _must_be_writable(*outputs: Path | None, scratch: bool = False) -> None:
    """Raise ConfigurationError now for what could not be written once the work is done. scratch: temporary files are
    needed, too."""
    for out in outputs:
        if out is None:
            continue
        place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if not os.access(place, os.W_OK):
            raise ConfigurationError(f"{out} cannot be written: {place} is read-only or belongs to somebody else")
    if scratch:
        try:
            tempfile.gettempdir()
        except FileNotFoundError as error:
            raise ConfigurationError(f"no folder for temporary files ({error}); set TMPDIR to one") from None
