"""`ripcurrent bundle`: list the versions of a store, show the serving one, promote another."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from streamer.cli.flags import takes_settings
from streamer.settings import Settings

if TYPE_CHECKING:
    from streamer.bundles.store import Store

app = typer.Typer(name="bundle", no_args_is_help=True, help="Versions of bundles: list, show, promote, roll back.")
Where = Annotated[Path, typer.Option("--store", help="The store: what the setting `bundle` names.")]
STORE = Path("bundles")


def _open(path: Path) -> Store:
    """Imported late: help has to be quick."""
    from streamer.bundles.store import Store

    return Store(path)


@app.command("list")
def list_versions(store: Where = STORE) -> None:
    """The versions of a store, oldest first, with what each was fitted on; * serves."""
    opened = _open(store)
    names = opened.names()
    if not names:
        typer.echo(f"{store} has no versions; ripcurrent bundle promote BUNDLE --store {store}")
    for name in names:
        manifest = opened.manifest(name)
        training = manifest["training"]
        first, last = (
            "unknown" if training[end] is None else datetime.fromtimestamp(training[end] / 1000, UTC).date()
            for end in ("from", "to")
        )
        mark = "*" if name == opened.current else " "
        typer.echo(f"{mark} {name}  made {manifest['created']}  {training['events']:,} events of {first} to {last}")


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="A version; by default the one that serves.")] = "",
    store: Where = STORE,
) -> None:
    """The manifest of a version, and since when it serves."""
    opened = _open(store)
    name = version or opened.current or ""
    since = [when for when, promoted in opened.history() if promoted == name]
    shown = opened.manifest(name) | {"serves": name == opened.current, "promoted": since}
    typer.echo(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())


@app.command()
@takes_settings("redact")
def refresh(
    settings: Settings,
    files: Annotated[list[Path], typer.Argument(help="Events of some days: NDJSON, gzipped NDJSON or Parquet.")],
    bundle: Annotated[Path, typer.Option(help="The bundle to refresh, or the store of the one that serves.")] = STORE,
    out: Annotated[Path, typer.Option(help="Where the new bundle goes.")] = Path("refreshed"),
    alerts_per_day: Annotated[float, typer.Option(help="The budget: what is an alert never joins.")] = 20,
) -> None:
    """Let what has been normal for long enough join the baseline of a new version; promote it to let it serve.

    Joins what was never an alert and came on three days or more; at most 20 new kinds of event of one entity. Entities
    that moved away from what was first learned, a little each day, are named, and nothing of theirs joins.
    """
    from streamer.event_files import readable_again
    from streamer.training.refresh import refresh as run

    with readable_again(files) as paths:
        done = run(paths, bundle, out, alerts_per_day=alerts_per_day, redact=settings.redact)
    if done.unread:
        typer.echo(str(done.unread), err=True)
    refused = ", ".join(f"{n:,} {why}" for why, n in done.released.refused.items()) or "none"
    typer.echo(f"{done.bundle.version} in {out}: {len(done.released.rows):,} vectors joined; refused: {refused}")
    for entity, day in done.released.drifting.items():
        typer.echo(f"drifting since {datetime.fromtimestamp(day / 1000, UTC).date()}: {entity}", err=True)


@app.command()
def promote(
    bundle: Annotated[str, typer.Argument(help="A version of the store, or a bundle's directory.", show_default=False)],
    store: Where = STORE,
) -> None:
    """Let a version serve; a bundle from elsewhere is copied into the store. Services that run take it up."""
    before = _open(store).current
    typer.echo(f"{_open(store).promote(bundle)} serves" + (f", {before} did" if before else ""))


@app.command()
def rollback(store: Where = STORE) -> None:
    """Let the version serve that served before this one."""
    before = _open(store).current
    typer.echo(f"{_open(store).rollback()} serves, {before} did")
