"""Shared flags of commands: settings under their dotted names, with one meaning and default everywhere, and the ends of
a range of a topic."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from streamer.errors import ConfigurationError
from streamer.settings import FORMER_NAMES, hide, is_secret, leaves, load

_PANELS = {"kafka": "Kafka connection", "redis": "Redis connection"}
_METAVARS = {str(int): "N", str(float): "N", str(float | None): "N", str(Path): "PATH"}

PLACE = (
    "earliest, latest, an offset (5000), epoch ms, an ISO time (2026-11-23T10:00Z) or a time before now (6h); 2=5000 "
    "for partition 2, topic:2=5000 where there are several topics"
)
From = Annotated[
    list[str] | None, typer.Option("--from", help=f"Where to begin: {PLACE}.", metavar="PLACE", show_default="earliest")
]
To = Annotated[
    list[str] | None, typer.Option("--to", help="Where to end, in the same words.", metavar="PLACE", show_default="now")
]
Last = Annotated[
    str | None, typer.Option(help="The last 6h, 15m, 7d: short for --from.", metavar="TIME", show_default="none")
]


def takes_settings(*only: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command of `settings` a flag for each setting, and --config; other parameters stay as they are.

    only: names of settings and of whole sections, where not all matter. A secret has no flag: a command line can be
    read by everybody on the host.
    """
    shown = {
        name: field
        for name, field in leaves()
        if not is_secret(field) and (not only or name in only or name.rpartition(".")[0] in only)
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_flags(config: Path | None = None, **given: Any) -> None:
            flags = {name: _properties(given.pop(name.replace(".", "_"))) for name in shown}
            settings = load(flags, config)
            try:
                command(settings=settings, **given)
            except Exception as error:
                error.args = tuple(hide(part, settings) if isinstance(part, str) else part for part in error.args)
                raise

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        file = typer.Option(None, "--config", help="TOML file of settings (default: ripcurrent.toml if there is one)")
        parameters = [p.replace(kind=keyword) for p in own]
        parameters.append(inspect.Parameter("config", keyword, default=file, annotation=Path | None))
        parameters.extend(_parameter(name, field) for name, field in shown.items())
        with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_flags

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    many = get_origin(field.annotation) is dict
    option = typer.Option(
        None,
        *(_flag(spelled, many) for spelled in (name, *(old for old, new in FORMER_NAMES.items() if new == name))),
        help=f"{field.description} (default: {_default(field.default)})",
        metavar="KEY=VALUE" if many else _METAVARS.get(str(field.annotation), "TEXT"),
        rich_help_panel=_PANELS.get(name.rpartition(".")[0], "Settings"),
        show_default=False,
    )
    kind: Any = list[str] | None if many else str | None
    return inspect.Parameter(name.replace(".", "_"), inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _flag(name: str, many: bool) -> str:
    return "--" + (name.removesuffix("ies") + "y" if many else name).replace(".", "-").replace("_", "-")


def _default(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else "none" if value in (None, "", {}) else str(value)


def _properties(given: Any) -> Any:
    """KEY=VALUE words as a dict; anything else as it is. None was not given."""
    if not isinstance(given, list):
        return given
    wrong = [word for word in given if "=" not in word]
    if wrong:
        raise typer.BadParameter(f"KEY=VALUE is needed, and one of {len(given)} has no =")
    return dict(word.split("=", 1) for word in given) or None


def ends_of(since: list[str] | None, until: list[str] | None, last: str | None) -> tuple[list[str], list[str]]:
    """Both ends of a range as they were given. Raises ConfigurationError."""
    if last and since:
        raise ConfigurationError("--last and --from both say where to begin")
    return [last] if last else since or [], until or []
