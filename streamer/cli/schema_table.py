"""The feature schema as a table for review: the fields with their kinds, and the paths set aside with the reason."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from encoder.features.schema import Field, Schema

_SHOWN_VALUES = 3
_SHOWN_LENGTH = 24


def schema_table(schema: Schema) -> Table:
    """One row a field in the order of the features, then one row a path that is set aside."""
    fields = f"{len(schema.fields)} fields, {len(schema.set_aside)} paths set aside, from {schema.events:,} events"
    table = Table(title=f"Schema {schema.hash[:12]}: {fields}", title_justify="left")
    table.add_column("field", overflow="fold")
    table.add_column("kind")
    table.add_column("present", justify="right")
    table.add_column("values", justify="right")
    table.add_column("most common, and what was done with the rest", overflow="fold")
    for field in schema.fields:
        actor = " (who acts)" if field.name in schema.actors else ""
        known = len(field.values) + len(field.later) + field.left_out
        values = f"{known:,}" if field.kind != "number" else f"{len(field.edges) + 1} bins"
        present = f"{field.present / max(schema.events, 1):.1%}"
        table.add_row(escape(field.name) + actor, field.kind, present, values, escape(_words(field)))
    for path, reason in schema.set_aside.items():
        table.add_row(escape(path), "set aside", "", "", escape(reason), style="dim")
    return table


def _words(field: Field) -> str:
    if field.kind == "presence":
        return "too many values to tell apart: whether it is there"
    if field.kind == "number":
        return "log scale, rank among the values of training"
    shown = ", ".join(_short(value) for value in field.values[:_SHOWN_VALUES])
    more = len(field.values) - _SHOWN_VALUES
    parts = [shown] + ([f"{more:,} more"] if more > 0 else [])
    if len(field.values) == 1 and field.name != "type_uid":
        parts.append("never another in training: a surprise where it changes")
    if field.later:
        parts.append(f"{len(field.later):,} that came only while it was calibrated count as unknown")
    if field.left_out:
        parts.append(f"the {field.left_out:,} rarest count as unknown")
    return "; ".join(parts)


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN_LENGTH else value[: _SHOWN_LENGTH - 1] + "…"
