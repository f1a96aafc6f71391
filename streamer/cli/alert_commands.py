"""The commands for those who read alerts: tail, explain, feedback, suppressions and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from streamer.alerting.text import moment
from streamer.cli.flags import From, Last, To, ends_of, takes_settings
from streamer.errors import ConfigurationError
from streamer.settings import Settings

if TYPE_CHECKING:
    from streamer.alerting.alert_reader import AlertEpisode, Finding


class Verdict(StrEnum):
    """As `streamer.alerting.verdicts` knows them."""

    true_positive = "true-positive"
    benign = "benign"
    ignore = "ignore"


_LEVELS = ("informational", "low", "medium", "high", "critical")
Uid = Annotated[
    str, typer.Argument(metavar="UID", help="Of the alert or the finding; its beginning is enough.", show_default=False)
]
InFile = Annotated[
    Path | None,
    typer.Option("--file", help="Findings as JSON lines, in place of the alert topic.", show_default="none"),
]


@takes_settings("alerts", "feedback", "kafka")
def explain(
    settings: Settings,
    uid: Uid,
    file: InFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="What explains it, as JSON.")] = False,
    since: From = None,
) -> None:
    """Why an alert came: what was unusual against what is usual, its events, and what came of it since."""
    from rich.console import Console

    from streamer.alerting.alert_reader import find_episode, in_file
    from streamer.cli.alert_view import full_text

    episode = find_episode(in_file(file), uid) if file is not None else _episode_on_topic(settings, uid, since or [])
    if as_json:
        typer.echo(orjson.dumps(episode.most_unusual, option=orjson.OPT_INDENT_2).decode())
        return
    Console(highlight=False, soft_wrap=True).print(full_text(episode))


@takes_settings("alerts", "kafka")
def tail(
    settings: Settings,
    since: From = None,
    until: To = None,
    last: Last = None,
    severity: Annotated[
        str, typer.Option(help=f"At least this: {', '.join(_LEVELS)}.", metavar="LEVEL")
    ] = "informational",
    entity: Annotated[str, typer.Option(help="Only about this: user:bob, or a part of it.", show_default="all")] = "",
    match: Annotated[str, typer.Option(help="Only with this in their title or cause.", show_default="all")] = "",
    every: Annotated[bool, typer.Option("--all", help="Also updates, closes and verdicts.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="With why it came, under each line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Whole findings, as JSON lines.")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Do not wait for what is yet to come.")] = False,
) -> None:
    """Alerts as they come, a line each: when, how severe, what, and its uid for `explain`.

    Begins with what comes from now on; --last 6h or --from shows what was. With --to or --no-follow it ends.
    """
    from rich.console import Console

    from streamer.alerting.alert_reader import between, live
    from streamer.cli.alert_view import one_line

    wanted = _filter(severity, entity, match, every)
    starts, ends = ends_of(since, until, last)
    console = Console(highlight=False, soft_wrap=True)
    ended = ends or no_follow
    try:
        for finding in between(settings, starts, ends) if ended else live(settings, starts or ["latest"]):
            if finding is None or not wanted(finding):
                continue
            if as_json:
                typer.echo(orjson.dumps(finding).decode())
            else:
                console.print(one_line(finding, verbose))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@takes_settings("alerts", "feedback", "kafka")
def feedback(
    settings: Settings,
    uid: Uid,
    verdict: Annotated[
        Verdict,
        typer.Argument(help="true-positive, benign (the same is silenced) or ignore (the same, for a time)."),
    ],
    lasts: Annotated[
        str | None,
        typer.Option(
            "--for", help="How long the same is silenced: 12h, 30d; 90d at most.", show_default="30d if benign"
        ),
    ] = None,
    why: Annotated[str, typer.Option(help="For those who look at it later.", show_default="nothing")] = "",
    by: Annotated[str | None, typer.Option(help="Who says so.", show_default="the user who types it")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Say what an alert was. Benign and ignore silence the same: this entity, class of event and cause, until they end.

    Before that, it shows what they would have silenced in the last day. A later verdict on the same takes the place of
    an earlier one; true-positive lifts it. All verdicts stay in the feedback topic: `ripcurrent suppressions`.
    """
    import getpass
    import time

    from streamer.alerting.alert_reader import between
    from streamer.alerting.suppression_feed import publish
    from streamer.alerting.verdicts import preview, verdict_on
    from streamer.kafka.offset_ranges import parse_duration

    if verdict is Verdict.ignore and lasts is None:
        raise ConfigurationError("ignore for how long? for example --for 7d")
    finding = _episode_on_topic(settings, uid, []).named(uid)
    now_ms = int(time.time() * 1000)
    until = None if lasts is None else now_ms + parse_duration(lasts)
    who = by or getpass.getuser()
    update, suppression = verdict_on(finding, verdict.value, by=who, why=why, now_ms=now_ms, until_ms=until)
    typer.echo(f"{verdict.value}: {finding['finding_info']['title']}")
    if suppression is not None:
        last_day = preview(between(settings, ["1d"], []), suppression.scope)
        typer.echo(f"silences {suppression.scope} until {moment(suppression.until)}")
        alerts = f"{last_day.alerts:,} alert{'s' if last_day.alerts != 1 else ''}"
        typer.echo(f"of the last day that is {alerts} with {last_day.events:,} events")
        for title in last_day.titles:
            typer.echo(f"  {title}")
    if not yes:
        typer.confirm("Do it?", abort=True)
    publish(settings, update)
    typer.echo(f"written by {who} as {update['metadata']['uid'][:8]}")


@takes_settings("feedback", "kafka")
def suppressions(
    settings: Settings,
    every: Annotated[bool, typer.Option("--all", help="Also those that ended or were lifted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON lines.")] = False,
) -> None:
    """What is silenced now, since when and until when, who said so and why; the metric ripcurrent_suppressed_total says
    how much each silences."""
    import time

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from streamer.alerting.suppression_feed import read_suppressions

    now_ms = int(time.time() * 1000)
    table = Table("uid", "entity", "class", "cause", "since", "until", "verdict", "by", "why", box=None)
    for suppression in read_suppressions(settings):
        if not every and suppression.until <= now_ms:
            continue
        if as_json:
            typer.echo(orjson.dumps(suppression).decode())
            continue
        scope = suppression.scope
        when = (
            moment(suppression.since),
            moment(suppression.until) if suppression.until > now_ms else f"ended {moment(suppression.until)}",
        )
        row = (suppression.uid[:8], scope.entity, str(scope.class_uid), scope.cause, *when)
        table.add_row(*map(Text, (*row, suppression.verdict, suppression.by, suppression.why)))
    if not as_json:
        Console().print(table)


@takes_settings("alerts", "scores", "feedback", "alerts_per_day", "metrics_address", "metrics_port", "kafka")
def report(
    settings: Settings,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Evaluations (evaluate --json), scores and findings (score, replay).", show_default=False),
    ] = None,
    since: From = None,
    until: To = None,
    last: Last = None,
    out: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Ripcurrent report",
) -> None:
    """A page about files, or about the last day of the alert topic: figures, budget, scores, drift, and the top
    episodes with why and when. One HTML file that needs no network.

    Where `scores` names a topic, its p-values are in it too, and where `feedback` does, the verdicts; where the service
    runs on this machine, how far fields have moved from training.
    """
    import time

    from streamer.alerting.alert_reader import between, values
    from streamer.cli.doctor import service
    from streamer.report.page import page
    from streamer.report.report import Material
    from streamer.report.report import report as made_of

    material = Material()
    for file in files or []:
        material.add_file(file)
    if not files:
        starts, ends = ends_of(since, until, last)
        topics = [settings.alerts, *([settings.feedback] if settings.feedback else [])]
        for topic in topics:
            material.findings += between(settings.model_copy(update={"alerts": topic}), starts or ["1d"], ends)
        if settings.scores:
            scores = settings.model_copy(update={"alerts": settings.scores})
            for value in values(scores, starts or ["1d"], ends):
                material.add_line(value)
            topics.append(settings.scores)
        material.sources += [f"topic {topic}" for topic in topics]
        if settings.metrics_port:
            checks = {check.what: check for check in service(settings)}
            material.drift = checks["drift"].text if "drift" in checks else ""
            if "repairs" in checks and checks["repairs"].mark != "ok":
                material.repairs = checks["repairs"].text
    made_ms = int(time.time() * 1000)
    promised = settings.alerts_per_day if material.findings else None
    out.write_text(page(made_of(material, title=title, made_ms=made_ms, promised=promised)))
    typer.echo(f"{len(material.findings):,} findings, {len(material.p_values):,} scores, the page is {out}")


def _episode_on_topic(settings: Settings, uid: str, since: Sequence[str]) -> AlertEpisode:
    """The episode on the alert topic that a uid names, with its verdicts."""
    from streamer.alerting.alert_reader import between, find_episode

    def findings(of: str) -> Iterator[Finding]:
        needle = of.lower().encode()
        topics = [settings, *([settings.model_copy(update={"alerts": settings.feedback})] if settings.feedback else [])]
        return chain.from_iterable(between(topic, since, [], lambda value: needle in value) for topic in topics)

    episode = find_episode(findings(uid), uid)
    return find_episode(
        findings(episode.uid), episode.uid
    )  # An alert does not hold the uids of the other alerts of its episode.


def _filter(severity: str, entity: str, match: str, every: bool) -> Callable[[Finding], bool]:
    if severity.lower() not in _LEVELS:
        raise ConfigurationError(f"--severity {severity!r}: one of {', '.join(_LEVELS)}")
    least = _LEVELS.index(severity.lower()) + 1
    entity, match = entity.lower(), match.lower()

    from streamer.alerting.alert_reader import own

    def wanted(finding: dict[str, Any]) -> bool:
        unmapped = own(finding)
        about = f"{unmapped.get('entity')} {(unmapped.get('episode') or {}).get('entity')}".lower()
        said = f"{finding['finding_info'].get('title')} {unmapped.get('cause')}".lower()
        return (
            (every or finding.get("activity_id") == 1)
            and finding.get("severity_id", 0) >= least
            and entity in about
            and match in said
        )

    return wanted
