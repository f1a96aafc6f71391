"""The commands that read and write topics beside the service: replay."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from streamer.cli.file_commands import progress_bars
from streamer.cli.flags import From, Last, To, ends_of, takes_settings
from streamer.errors import ConfigurationError
from streamer.settings import Settings

if TYPE_CHECKING:
    from streamer.replay.comparison import Change
    from streamer.replay.replay import Counts, Plan


@takes_settings(
    "bundle",
    "tenant",
    "device",
    "events",
    "alerts_per_day",
    "threshold",
    "ledger",
    "redact",
    "feedback",
    "batch_size",
    "kafka",
)
def replay(
    settings: Settings,
    since: From = None,
    until: To = None,
    last: Last = None,
    warmup: Annotated[
        str,
        typer.Option(help="How much before the first record is read to fill windows. 0: nothing.", metavar="TIME"),
    ] = "8d",
    out: Annotated[Path, typer.Option(help="Where the alerts go, a JSON line each.")] = Path("replay.ndjson"),
    out_topic: Annotated[
        str | None, typer.Option(help="A topic that the alerts go to, in place of the file.", show_default="none")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Also write the score of every event there.", show_default="none")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Another bundle: write which alerts it gains, loses and re-ranks.", show_default="none"),
    ] = None,
) -> None:
    """Score a range of the events topics again, beside the service and without touching anything of it.

    The range is fixed when the command starts. The same range and bundle give the same alert ids and scores, and those
    of the service where the warm-up reaches as far as its windows did: they hold 7 days. Cut off, the same command goes
    on where it was.
    """
    from streamer.bundles.manifest import verify
    from streamer.kafka.offset_ranges import parse_duration
    from streamer.replay.comparison import Comparing, compare_file
    from streamer.replay.outputs import FileSink, TopicSink
    from streamer.replay.replay import ReplayDetector, ReplayProgress, plan
    from streamer.replay.replay import replay as run

    if ((scores or compare) and out_topic) or (scores and compare):
        raise ConfigurationError("--scores, --compare and --out-topic: choose one")
    starts, ends = ends_of(since, until, last)
    warmup_ms = 0 if warmup == "0" else parse_duration(warmup)
    for bundle in (settings.bundle, compare):
        if bundle is not None:
            verify(bundle)
    sink: FileSink | TopicSink
    if out_topic is not None:
        sink = TopicSink(settings, out_topic)
    else:
        candidates = out.with_name(f"{out.name}.candidates")
        sink = FileSink(candidates if compare else out, scores)

    judge = ReplayDetector.open(settings, settings.bundle)
    asked: dict[str, Any] = {"topics": settings.events, "from": starts, "to": ends, "warmup": warmup}
    asked |= {"bundle": judge.version, "tenant": settings.tenant, "line": settings.threshold, "scores": bool(scores)}
    asked |= {"alerts_per_day": settings.alerts_per_day}
    judging: Comparing | ReplayDetector = judge
    if compare is not None:
        other = ReplayDetector.open(settings, compare)
        judging, asked = Comparing(judge, other), asked | {"compare": other.version}

    def frozen() -> Plan:
        return plan(settings, starts, ends, warmup_ms, int(time.time() * 1000))

    with _cut_off("the same command goes on where it was"):
        progress: ReplayProgress = sink.begin(orjson.dumps(asked).decode(), frozen)
        _say_range(progress.plan, progress.counts)
        judging.begin(progress.plan.horizon_ms)
        with progress_bars() as show:
            run(settings, progress, judging, sink, show)
    if compare is not None:
        _show_changes(compare_file(candidates, out), judge.version, other.version)
    sink.finish()
    if compare is not None:
        candidates.unlink()
    _say_done(progress.counts, out_topic or str(out), warmup, comparing=compare is not None)


class _cut_off:  # noqa: N801 - reads as a word of the language
    """SIGTERM and Ctrl-C end the block at once: whatever is lost then is done again by the next start."""

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __enter__(self) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        self._before = signal.signal(signal.SIGTERM, interrupt)

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if kind is KeyboardInterrupt:
            typer.echo(f"cut off; {self._advice}", err=True)
            raise typer.Exit(130)


def _say_range(plan: Plan, done: Counts) -> None:
    total = sum(end - start for start, end in plan.scored.values())
    before = sum(plan.scored[source][0] - start for source, start in plan.start.items())
    empty = sum(start == end for start, end in plan.scored.values())
    typer.echo(
        f"{len(plan.scored)} partitions ({empty} with nothing in the range), {total:,} offsets to replay after "
        f"{before:,} of warm-up" + (f"; going on after {done.messages:,} messages" if done.messages else ""),
        err=True,
    )


def _say_done(counts: Counts, where: str, warmup: str, *, comparing: bool) -> None:
    what = f"differences in {where}" if comparing else f"{counts.alerts:,} alerts in {where}"
    typer.echo(f"{counts.events:,} events of {counts.messages:,} messages, {what}")
    if counts.rejects:
        typer.echo(f"{counts.rejects:,} could not be read", err=True)
    if counts.incomplete:
        typer.echo(
            f"{counts.incomplete:,} events have history that a warm-up of {warmup} does not cover (or that Kafka no "
            "longer holds): their scores may differ from the service's",
            err=True,
        )


def _show_changes(changes: list[Change], before: str, after: str, most: int = 10) -> None:
    from rich.console import Console
    from rich.table import Table

    from streamer.replay.comparison import totals

    table = Table(title=f"{before} -> {after}: {totals(changes)}", title_justify="left")
    for name in ("change", "entity", "cause", "event", "p before", "p after", "rank"):
        table.add_column(name)
    for what in ("gained", "lost", "re-ranked"):
        for change in [change for change in changes if change.what == what][:most]:
            p_values = [f"{p:.2g}" if p is not None else "" for p in (change.p_before, change.p_after)]
            rank = f"{change.rank_before} -> {change.rank_after}" if change.rank_before else ""
            table.add_row(what, change.entity, change.cause, change.at, *p_values, rank)
    Console().print(table)
