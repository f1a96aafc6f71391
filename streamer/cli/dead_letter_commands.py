"""`ripcurrent dlq`: list, show and send back dead letters."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from streamer.cli.flags import From, Last, To, ends_of, takes_settings
from streamer.settings import Settings

if TYPE_CHECKING:
    from streamer.kafka.dead_letter_reader import DeadLetter

app = typer.Typer(
    name="dlq", no_args_is_help=True, help="Messages that could not be read, scored or written: list, show, send back."
)
Kind = Annotated[
    str | None, typer.Option("--exception", help="Only letters of this kind.", metavar="NAME", show_default="all")
]


@app.command("list")
@takes_settings("dead_letters", "kafka")
def list_letters(
    settings: Settings,
    since: From = None,
    until: To = None,
    last: Last = None,
    exception: Kind = None,
    most: Annotated[int, typer.Option(help="Letters to show, the latest.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="All of them, as JSON lines.")] = False,
) -> None:
    """How many dead letters there are of each kind, and the latest of them."""
    from streamer.kafka.dead_letter_reader import letters, range_of

    starts, ends = ends_of(since, until, last)
    wanted = range_of(settings, starts, ends, int(time.time() * 1000))
    counts: Counter[tuple[str, str, str]] = Counter()
    latest: list[DeadLetter] = []
    for batch in letters(settings, wanted):
        chosen = [letter for letter in batch if exception in (None, letter.exception)]
        counts.update((letter.stage, letter.exception, letter.source[0]) for letter in chosen)
        latest = [*latest, *chosen][-max(most, 0) :] if most > 0 else []
        if as_json:
            for letter in chosen:
                typer.echo(orjson.dumps(_described(letter)).decode())
    if not as_json:
        _print_letters(counts, latest, settings.dead_letters)


@app.command()
@takes_settings("dead_letters", "kafka")
def show(
    settings: Settings,
    where: Annotated[str, typer.Argument(metavar="PARTITION:OFFSET", help="As `list` shows it.", show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="Only the value, byte for byte.")] = False,
) -> None:
    """One letter whole: why it is here, where it came from, its key, headers and value."""
    from streamer.kafka.dead_letter_reader import named, place

    (letter,) = named(settings, [place(where)])
    if raw:
        sys.stdout.buffer.write(letter.value or b"")
        return
    described = _described(letter)
    described |= {"headers": {key: _text(value) for key, value in letter.headers}}
    described |= {"key": _text(letter.key), "value": _text(letter.value)}
    typer.echo(orjson.dumps(described, option=orjson.OPT_INDENT_2).decode())


@app.command()
@takes_settings("dead_letters", "events", "kafka")
def redrive(
    settings: Settings,
    where: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PARTITION:OFFSET]...", help="These letters, again if need be; none: all not sent yet."
        ),
    ] = None,
    exception: Kind = None,
    to: Annotated[
        str | None, typer.Option(help="Send all to this topic.", metavar="TOPIC", show_default="where each came from")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Send dead letters back to the topics that they came from, without the errors in their headers.

    Without arguments, all that came since the last redrive, each once: what was sent and how far it got is one
    transaction. The service then reads them as new messages. Stubs of messages that were too large stay.
    """
    from streamer.kafka.dead_letter_reader import letters, named, place, positions, unsent
    from streamer.kafka.dead_letter_reader import redrive as run

    sent = positions(settings)
    if not dry_run:
        sent.open()
    found: Iterable[list[DeadLetter]]
    if where:
        found = [[letter] for letter in named(settings, [place(text) for text in where])]
    else:
        found = letters(settings, unsent(settings, sent, int(time.time() * 1000)))
    if dry_run:
        letters_found = [letter for batch in found for letter in batch if exception in (None, letter.exception)]
        kinds = Counter((letter.stage, letter.exception, to or letter.source[0]) for letter in letters_found)
        _print_letters(kinds, letters_found[-20:], "to send")
        return
    result = run(settings, found, sent, to=to, exception=exception, remember=not where)
    sent.close()
    for topic, count in result.sent.items():
        typer.echo(f"{count:,} sent to {topic}")
    for why, count in result.left.items():
        if count:
            typer.echo(f"{count:,} left: {why}", err=True)
    if not result.sent and not +result.left:
        typer.echo("nothing to send")


def _described(letter: DeadLetter) -> dict[str, Any]:
    return {
        "letter": letter.place,
        "source": letter.origin,
        "time": _time(letter.timestamp),
        "exception": letter.exception,
        "reason": letter.reason,
        "stage": letter.stage,
        "bytes": len(letter.value or b""),
        "stub": letter.stub,
        "redriven": letter.redriven,
    }


def _print_letters(counts: Counter[tuple[str, str, str]], latest: list[DeadLetter], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    kinds = Table(title=f"{sum(counts.values()):,} letters: {title}", title_justify="left")
    for name in ("stage", "exception", "topic", "letters"):
        kinds.add_column(name, justify="right" if name == "letters" else "left")
    for kind, count in counts.most_common():
        kinds.add_row(*(Text(name or "unknown") for name in kind), f"{count:,}")
    console.print(kinds)
    if not latest:
        return
    table = Table(title=f"the latest {len(latest)}", title_justify="left")
    for name in ("letter", "source", "time", "bytes", "redriven", "reason"):
        table.add_column(name, overflow="fold", justify="right" if name in ("bytes", "redriven") else "left")
    for letter in latest:
        size = f"{len(letter.value or b''):,}"
        cells = (letter.place, letter.origin, _time(letter.timestamp), size, str(letter.redriven), letter.reason[:200])
        table.add_row(*map(Text, cells))
    console.print(table)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds") if ms >= 0 else ""


def _text(value: bytes | None) -> str | None:
    """As text; bytes that are none as \\x.."""
    return None if value is None else value.decode("utf-8", "backslashreplace")
