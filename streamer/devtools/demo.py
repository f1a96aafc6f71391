"""`ripcurrent demo`: fits on a week of a simulated company, streams the next day through real servers, and shows a
scorecard.

It runs what a user would run: `ripcurrent fit` and `ripcurrent run` as processes, a real Kafka, a real Valkey, and this
process as subscriber of the alert topic. Only this process knows the labels. Promises to leave no process and no file
behind, however it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from state.episodes import CLOSE
from streamer.devtools import servers
from streamer.devtools.simulator.generator import EVENTS_PER_DAY, Day, Label, schedule, simulate, write
from streamer.devtools.simulator.incidents import KINDS
from streamer.errors import ConfigurationError, StreamError
from streamer.settings import PREFIX, variable

BUDGET = 20.0
"""The alert budget of the service per day."""
WARM_DAYS = 3
"""The last days of the week, which the service scores first, so that its windows are filled; this measures throughput.
"""
PRODUCED_FOR_S = 30.0
"""Seconds in which the eighth day is produced."""
STARTS_WITHIN_S = 90.0
SILENT_FOR_S = 60.0
"""How long the service may make no progress before the demo ends with an error."""
COMMAND = (sys.executable, "-c", "from streamer.cli.main import main; main()")
_SEVERITY = {1: "dim", 2: "cyan", 3: "yellow", 4: "red", 5: "bold red"}


class Seen(NamedTuple):
    """An alert as received: the finding, the offset of its event, and the time of arrival (epoch ms)."""

    finding: dict[str, Any]
    offset: int
    came: int


@dataclass
class Scorecard:
    """Compares alerts with the labels of the n events of the eighth day, which begins at offset `first`.

    labels: n; times: n event times; appended: epoch ms at which Kafka took each event, by offset.
    """

    labels: list[Label]
    times: list[int]
    first: int = 0
    appended: dict[int, int] = field(default_factory=dict)
    alerted: dict[str, list[int]] = field(default_factory=dict)
    false_alarms: int = 0
    latencies: list[int] = field(default_factory=list)

    def add(self, seen: Seen) -> str | None:
        """Count an alert; returns the kind of its incident, "" for a false alarm, None for a Close and for an event of
        another day."""
        row = seen.offset - self.first
        if not 0 <= row < len(self.labels) or seen.finding.get("activity_id") == CLOSE:
            return None
        if seen.offset in self.appended:
            self.latencies.append(seen.came - self.appended[seen.offset])
        label = self.labels[row]
        if label.label:
            self.alerted.setdefault(label.sequence, []).append(row)
        elif seen.finding.get("activity_id") == 1:
            self.false_alarms += 1
        return label.attack

    def incidents(self) -> list[tuple[str, str, list[int], list[int]]]:
        """(id, kind, rows of its events, rows with alerts) of each incident, in the order of their beginnings."""
        rows: dict[str, list[int]] = {}
        for row, label in enumerate(self.labels):
            if label.label:
                rows.setdefault(label.sequence, []).append(row)
        return [(uid, self.labels[of[0]].attack, of, sorted(self.alerted.get(uid, []))) for uid, of in rows.items()]

    def latency(self) -> tuple[float, float]:
        """p50 and p99 in ms from Kafka's append of the event to the receipt of the alert; nan without alerts."""
        if not self.latencies:
            return float("nan"), float("nan")
        p50, p99 = np.percentile(self.latencies, [50, 99])
        return float(p50), float(p99)


def demo(
    console: Console | None = None,
    *,
    seed: int = 0,
    events_per_day: int = EVENTS_PER_DAY,
    seconds: float = PRODUCED_FOR_S,
    command: Sequence[str] = COMMAND,
) -> int:
    """Run the demo; returns the exit code: 0, or 130 after Ctrl-C or SIGTERM.

    seconds: in which the eighth day is produced; command: starts `ripcurrent`. Raises `RipcurrentError` where a server,
    `fit` or the service fails.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            _play(stack, console, seed, events_per_day, seconds, command)
    except KeyboardInterrupt:
        console.print("stopped; servers and files are gone")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _play(
    stack: ExitStack, console: Console, seed: int, events_per_day: int, seconds: float, command: Sequence[str]
) -> None:
    begun = time.monotonic()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ripcurrent-demo-")))
    week, eighth, warm = _simulate(folder, seed, events_per_day)
    incidents = len({label.sequence for label in eighth.labels if label.label})
    console.print(
        f"A company of {events_per_day:,} events a working day: seven days to learn from ({week:,} events), "
        f"and an eighth with {incidents} incidents among {len(eighth):,} events."
    )
    console.print("\n[bold]$ ripcurrent fit week.ndjson.gz --out bundle[/]")
    fitting = stack.enter_context(_child([*command, "fit", "week.ndjson.gz", "--out", "bundle"], folder, {}, None))
    bootstrap = stack.enter_context(servers.kafka())
    redis_url = stack.enter_context(servers.valkey())
    if fitting.wait():
        raise ConfigurationError(f"ripcurrent fit ended with code {fitting.returncode}; what it said stands above")
    fitted = time.monotonic()

    name = f"demo-{uuid.uuid4().hex[:8]}"
    topics = stack.enter_context(_topics(bootstrap, name))
    environment = {
        "bundle": "bundle", "tenant": name, "events": topics[0], "alerts": topics[1], "dead_letters": topics[2],
        "ledger": topics[3],
        "start": "earliest", "metrics_port": "0", "log_level": "warning", "alerts_per_day": str(BUDGET),
        "kafka.bootstrap_servers": bootstrap, "kafka.group_id": name, "redis.url": redis_url,
    }  # fmt: skip
    console.print(f"\n[bold]$ ripcurrent run[/]  [dim](a budget of {BUDGET:.0f} alerts a day)[/]")
    card = Scorecard(eighth.labels, eighth.times, first=sum(map(len, warm)))
    stream = _Stream(bootstrap, name, topics)
    stack.callback(stream.close)
    log = stack.enter_context((folder / "service.log").open("wb"))
    settings = {variable(key): value for key, value in environment.items()}
    service = stack.enter_context(_child([*command, "run"], folder, settings, log))
    watched = _Watched(service, folder / "service.log", stream)
    rate = _catch_up(console, watched, warm)
    _stream_day(console, watched, eighth, card, seconds)
    _report(console, card, rate, fitted - begun, time.monotonic() - begun)


def _simulate(folder: Path, seed: int, events_per_day: int) -> tuple[int, Day, list[Day]]:
    """Writes the week to a file; returns its number of events, the eighth day, and the last days of the week."""
    warm: list[Day] = []
    eighth: list[Day] = []

    def seven() -> Iterator[Day]:
        for day in simulate(seed=seed, days=8, events_per_day=events_per_day, incidents=schedule(8)):
            if day.index == 7:
                eighth.append(day)
                return
            if day.index >= 7 - WARM_DAYS:
                warm.append(day)
            yield day

    events = write(seven(), folder / "week.ndjson.gz")
    return events, eighth[0], warm


@contextmanager
def _child(command: list[str], folder: Path, settings: dict[str, str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with these settings only, in its own session, so that Ctrl-C reaches it only through this process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    process = subprocess.Popen(  # noqa: S603 - our own command
        command, cwd=folder, env=inherited | settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _topics(bootstrap: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """The four topics, with one partition each and timestamps by the broker's clock."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    topics = (f"{name}-events", f"{name}-alerts", f"{name}-dead-letters", f"{name}-ledger")
    config = {"message.timestamp.type": "LogAppendTime"}
    new = [NewTopic(topic, num_partitions=1, replication_factor=1, config=config) for topic in topics[:3]]
    compacted = config | {"cleanup.policy": "compact"}
    new.append(NewTopic(topics[3], num_partitions=1, replication_factor=1, config=compacted))
    for made in admin.create_topics(new).values():
        made.result(30)
    try:
        yield topics
    finally:
        # Our own server is removed with its topics; on another server they must be deleted.
        if os.environ.get("RIPCURRENT_TEST_KAFKA"):
            with suppress(KafkaException):
                for gone in admin.delete_topics(list(topics)).values():
                    gone.result(30)


class _Stream:
    """Produces events, receives alerts, and reads the committed offset of the service."""

    def __init__(self, bootstrap: str, group: str, topics: tuple[str, ...]) -> None:
        self.events = topics[0]
        self.sent, self.done = 0, -1
        self.appended: dict[int, int] = {}
        # librdkafka would log each retry against a broker that has just started.
        client = {"bootstrap.servers": bootstrap, "log_level": 0}
        self.producer = Producer(client | {"enable.idempotence": True, "linger.ms": 2})
        subscriber = client | {"group.id": f"{group}-subscriber", "enable.auto.commit": False}
        self.subscriber = Consumer(subscriber | {"isolation.level": "read_committed", "auto.offset.reset": "earliest"})
        self.subscriber.assign([TopicPartition(topics[1], 0, 0)])
        # Uncommitted, so that reading does not wait for open transactions.
        self.progress = Consumer(client | {"group.id": group, "isolation.level": "read_uncommitted"})

    def produce(self, events: Sequence[bytes]) -> None:
        for event in events:
            while True:
                try:
                    self.producer.produce(self.events, event, partition=0, on_delivery=self._delivered)
                    break
                except BufferError:
                    self.producer.poll(0.1)
            self.sent += 1
        self.producer.poll(0)

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            raise StreamError(f"an event could not be produced: {error.str()}")
        self.appended[message.offset()] = message.timestamp()[1]

    def alerts(self) -> list[Seen]:
        """The alerts since the last call; waits at most 0.02 s."""
        seen = []
        for message in self.subscriber.consume(100, timeout=0.02):
            if message.error() is None and message.value() is not None:
                # topic:partition:offset:index of the event that the alert is about.
                source = str(dict(message.headers() or [])["ripcurrent.source"], "ascii")  # type: ignore[arg-type]
                offset = int(source.rsplit(":", 2)[1])
                seen.append(Seen(orjson.loads(message.value() or b""), offset, int(time.time() * 1000)))
        return seen

    def scored(self) -> int:
        """The number of events that the service has committed; -1 before its first commit."""
        # A slow broker is no error here: `_Watched` limits the time without progress.
        with suppress(KafkaException):
            (partition,) = self.progress.committed([TopicPartition(self.events, 0)], timeout=5)
            if partition.error is None:
                self.done = max(partition.offset, self.done)
        return self.done

    def close(self) -> None:
        self.subscriber.close()
        self.progress.close()


@dataclass
class _Watched:
    """The service, and whether it runs and makes progress."""

    process: subprocess.Popen[bytes]
    log: Path
    stream: _Stream
    reached: int = -1
    since: float = field(default_factory=time.monotonic)

    def scored(self) -> int:
        """The number of committed events. Raises `StreamError` when the service has ended or makes no progress."""
        if self.process.poll() is not None:
            raise StreamError(f"the service ended with code {self.process.returncode}: {self._said()}")
        now = self.stream.scored()
        if now != self.reached or now == self.stream.sent:
            self.reached, self.since = now, time.monotonic()
        if time.monotonic() - self.since > (SILENT_FOR_S if self.reached >= 0 else STARTS_WITHIN_S):
            raise StreamError(f"the service stands still at event {now} of {self.stream.sent}: {self._said()}")
        return now

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-2000:].strip() or "it said nothing"


@contextmanager
def _bar(console: Console, text: str, total: int) -> Iterator[Any]:
    """A function that shows the number done on a progress bar, or does nothing without a terminal."""
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)


def _catch_up(console: Console, watched: _Watched, days: list[Day]) -> float:
    """Once the service runs, produce these days at once; returns events/s from the first append to the last commit."""
    while watched.scored() < 0:
        time.sleep(0.05)
    events = sum(map(len, days))
    begun = time.monotonic()
    for day in days:
        watched.stream.produce(day.events)
    with _bar(console, "catching up", events) as show:
        while (done := watched.scored()) < events:
            watched.stream.alerts()
            show(done)
    rate = events / (time.monotonic() - begun)
    console.print(f"caught up on the last {WARM_DAYS} days: {events:,} events at {rate:,.0f} events/s\n")
    return rate


def _stream_day(console: Console, watched: _Watched, day: Day, card: Scorecard, seconds: float) -> None:
    """Produce the day at an even pace and show each alert as it comes, until the service has scored all of it."""
    stream = watched.stream
    card.appended = stream.appended
    begun = checked = time.monotonic()
    done, sent, end = stream.scored(), 0, stream.sent + len(day)
    with _bar(console, "Monday", len(day)) as show:
        while done < end:
            due = min(int((time.monotonic() - begun) / seconds * len(day)), len(day))
            stream.produce(day.events[sent:due])
            sent = due
            for seen in stream.alerts():
                _show(console, card, seen)
            if time.monotonic() - checked > 0.25:
                checked = time.monotonic()
                done = watched.scored()
                show(done - card.first)
    # The last alerts are visible when the last offsets are, give or take a fetch.
    last = time.monotonic()
    while time.monotonic() - last < 1.0:
        for seen in stream.alerts():
            last = time.monotonic()
            _show(console, card, seen)


def _show(console: Console, card: Scorecard, seen: Seen) -> None:
    """One line: time of the event, severity, title, and whether it belongs to an incident."""
    kind = card.add(seen)
    if kind is None:
        return
    finding = seen.finding
    style = _SEVERITY.get(finding.get("severity_id", 1), "default")
    title = escape(str(finding.get("finding_info", {}).get("title", "")))
    truth = f"[green]incident: {kind}[/]" if kind else "[dim]normal[/]"
    severity = str(finding.get("severity", ""))[:8]
    when = _clock(card.times[seen.offset - card.first])
    console.print(f"{when}  [{style}]{severity:8}[/]  {title}  ({truth})")


def _clock(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%H:%M:%S")


def _report(console: Console, card: Scorecard, rate: float, fitted: float, total: float) -> None:
    rows = []
    detected = {True: [0, 0], False: [0, 0]}
    for _uid, kind, events, alerted in card.incidents():
        incident = KINDS[kind]
        detected[incident.ordinary][0] += bool(alerted)
        detected[incident.ordinary][1] += 1
        when = f"at {_clock(card.times[alerted[0]])}, its event {events.index(alerted[0]) + 1}" if alerted else ""
        each = "each event ordinary" if incident.ordinary else "an odd event"
        rows.append((kind, incident.summary, each, str(len(events)), "found" if alerted else "missed", when))
    console.print()
    if console.is_terminal:
        table = Table("incident", "what", "made of", "events", "", "first alert", title="Scorecard", title_style="bold")
        for row in rows:
            table.add_row(*row, style="" if row[4] == "found" else "dim")
        console.print(table)
    else:
        for kind, summary, each, many, outcome, when in rows:
            console.print(f"{outcome:6}  {kind}: {summary} ({each}; {many} events) {when}".rstrip())
    (ordinary, of_ordinary), (unusual, of_unusual) = detected[True], detected[False]
    p50, p99 = card.latency()
    for name, value in (
        ("incidents found", f"{ordinary + unusual} of {of_ordinary + of_unusual} ({ordinary} of {of_ordinary} made of "
         f"ordinary events alone, {unusual} of {of_unusual} with an odd one)"),
        ("false alarms", f"{card.false_alarms} in the day (budget {BUDGET:.0f})"),
        ("throughput", f"{rate:,.0f} events/s, catching up"),
        ("latency", f"p50 {p50:,.0f} ms, p99 {p99:,.0f} ms, from Kafka's append of the event to the alert received"),
        ("time", f"{total:.0f} s, of which {fitted:.0f} s to simulate, fit and start the servers"),
    ):  # fmt: skip
        console.print(f"{name:16} {value}")
