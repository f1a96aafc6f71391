"""The commands for those who read alerts: tail and explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from streamer.errors import ConfigurationError
from streamer.flags import From, Last, To, ends_of, takes_settings
from streamer.settings import Settings

if TYPE_CHECKING:
    from streamer.alert_topic import Finding

_LEVELS = ("informational", "low", "medium", "high", "critical")
Uid = Annotated[
    str, typer.Argument(metavar="UID", help="Of the alert or the finding; its beginning is enough.", show_default=False)
]
InFile = Annotated[
    Path | None,
    typer.Option("--file", help="Findings as JSON lines, in place of the alert topic.", show_default="none"),
]


@takes_settings("alerts", "kafka")
def explain(
    settings: Settings,
    uid: Uid,
    file: InFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="What explains it, as JSON.")] = False,
    since: From = None,
) -> None:
    """Why an alert came: what was unusual against what is usual, its events, and what came of it since."""
    from rich.console import Console

    from streamer.alert_topic import between, in_file, story
    from streamer.showing import whole

    def findings(of: str) -> Iterator[Finding]:
        needle = of.lower().encode()
        return in_file(file) if file else between(settings, since or [], [], lambda value: needle in value)

    found = story(findings(uid), uid)
    found = story(findings(found.uid), found.uid)  # The uid of one alert is not in the others of its story.
    if as_json:
        typer.echo(orjson.dumps(found.told, option=orjson.OPT_INDENT_2).decode())
        return
    Console(highlight=False, soft_wrap=True).print(whole(found))


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

    from streamer.alert_topic import between, live
    from streamer.showing import line

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
                console.print(line(finding, verbose))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _filter(severity: str, entity: str, match: str, every: bool) -> Callable[[Finding], bool]:
    if severity.lower() not in _LEVELS:
        raise ConfigurationError(f"--severity {severity!r}: one of {', '.join(_LEVELS)}")
    least = _LEVELS.index(severity.lower()) + 1
    entity, match = entity.lower(), match.lower()

    from streamer.alert_topic import own

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
