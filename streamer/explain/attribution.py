"""Why events scored as they did, as data: the attributes that mattered, the counts, the course of events, and the
normal events nearest to them.

Asked of what is told alone, a handful of events at a time. Promises to look at nothing but the bundle, the event and
its entity's window. Knows no words (`streamer.alerting.text`) and no secrets (`streamer.redaction`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.features.normalization import FOLDER, WORD, derived, normalise
from encoder.features.schema import FIRST, UNKNOWN, Field
from encoder.features.vectorizer import FeatureBatch
from encoder.models.rarity import Surprise
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import KINDS
from encoder.ocsf.events import EventBatch, Message
from state.rolling_counts import LEVELS
from state.windows import Windows, WindowStore
from streamer.detection.cooccurrence_score import CAUSES as AT_ONCE
from streamer.detection.inactivity import CAUSE as SILENCE
from streamer.detection.record_score import NEIGHBOURS
from streamer.detection.sequence_score import MISSING, ORDER
from streamer.explain import peer_comparison as others
from streamer.explain import rates as much
from streamer.explain.leave_one_out import LATEST, cut, weights
from streamer.explain.peer_comparison import PeerComparison
from streamer.explain.rates import RateFinding

if TYPE_CHECKING:
    from streamer.detection.batches import ScoredBatch
    from streamer.detection.bundle import Bundle


Timeline = tuple[tuple[int, str, dict[str, Any], float], ...]
Likely = tuple[tuple[dict[str, Any], float], ...]


@dataclass(frozen=True)
class FieldFinding:
    """One attribute that mattered: what was observed, what else was expected with its probability, and -log p in nats.

    given: who acts, where the value is odd for that actor more than for events of this type; new: training had no such
    value at all.
    """

    path: str
    observed: str
    expected: tuple[tuple[str, float], ...]
    surprise: float
    given: str = ""
    new: bool = False


@dataclass(frozen=True)
class Explanation:
    """Why one event was alerted on, in the order of what mattered most.

    fields: at most five; neighbours: the nearest normal events, each a compact redacted copy (path -> value, and
    under `@event` where it stood), nearest first; distance and usual_distance: to the nearest normal and that of a
    normal event; window: for a sequence, (event time ms, coordinates, a normal event like it (path -> value; empty:
    there is none), share of its surprise that it would lose without this one) of each of its events, oldest first;
    instead: for a sequence, normal events one of which was expected in place of the newest (after a silence: after
    it), with their probability, likeliest first; rates: of a rate, how much it was, and what else was much; else
    none; others: what others of the same kind did in training (None: that is not known).
    """

    fields: tuple[FieldFinding, ...]
    neighbours: tuple[dict[str, Any], ...]
    distance: float
    usual_distance: float
    window: Timeline = ()
    instead: Likely = ()
    rates: tuple[RateFinding, ...] = ()
    others: PeerComparison | None = None


EXPLAINED_FIELDS = 5
EXPLAINED_NEIGHBOURS = 3
EXAMPLES = 32
"""Near normal events in which real examples of an expected value are looked for: the schema has it normalised."""
FEW = 8
"""Any examples of an expected value, where none is near."""
WORTH_TELLING = 1.5
"""Nats: what is expected more often than one time in four or five explains nothing."""
_STATISTICS = {ORDER: "order", MISSING: "missing", SILENCE: "ending"}
"""What of `SequenceScorer.raw` a cause rests on."""
_TEMPLATED = re.compile(r"\{\}|#|\*")
"""What `normalise` puts where ids, hexadecimal numbers and owners of home folders stood."""


@dataclass(frozen=True)
class _Event:
    """One of the events that are explained together, and its row among them."""

    events: EventBatch
    features: FeatureBatch
    surprise: Surprise
    row: int

    def raw(self, path: str) -> Any:
        """What stands at an attribute path; None where nothing does."""
        column = self.events.columns.get(path)
        at = int(np.searchsorted(column.rows, self.row)) if column is not None else 0
        there = column is not None and at < len(column.rows) and column.rows[at] == self.row
        return column.values[at] if column is not None and there else None

    def value(self, path: str) -> str:
        """The same as text; "" where nothing stands."""
        found = self.raw(path)
        return "" if found is None else _shown(found)


class Explainer:
    """Says why, with the bundle that scored and the windows that it scored on."""

    def __init__(self, bundle: Bundle, windows: WindowStore) -> None:
        self.bundle, self.windows = bundle, windows

    def explain(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Explanation]:
        """Why these events scored as they did; all of them go through each model together. Costs milliseconds an event:
        for alerts."""
        if not len(rows):
            return []
        encoder, record = self.bundle.encoder, self.bundle.scorer.record
        lines = [orjson.dumps(scored.records[row]) for row in rows.tolist()]
        times = scored.time[rows].tolist()
        events, _ = decode(
            [Message("", 0, i, time, line) for i, (time, line) in enumerate(zip(times, lines, strict=True))]
        )
        features = encoder.vectorize(events)
        surprise = encoder.rarity(features)
        distances, places = record.baseline.search(encoder.vectors(features), EXAMPLES)
        usual = float(np.median(record.calibrations["novelty"].scores))
        timelines, rates = self._timelines(scored, rows), self._rates(scored, rows)
        named = others.names_in(events)
        found = []
        for i, row in enumerate(rows.tolist()):
            near = [orjson.loads(self.bundle.exemplars[place]) for place in places[i].tolist()]
            alike = near[: int((distances[i] <= usual).sum())]
            event, cause, entity = (
                _Event(events, features, surprise, i),
                str(scored.cause[row]),
                str(scored.entity[row]),
            )
            fields, much_ = self._fields(event, near, cause), rates.get(row, ())
            found.append(
                Explanation(
                    fields,
                    tuple(near[:EXPLAINED_NEIGHBOURS]),
                    float(distances[i, :NEIGHBOURS].mean()),
                    usual,
                    *timelines.get(row, ((), ())),
                    much_,
                    self._others(event, cause, entity, named[i], fields, alike, much_),
                )
            )
        return found

    def _others(
        self,
        event: _Event,
        cause: str,
        entity: str,
        names: others.Names,
        fields: tuple[FieldFinding, ...],
        alike: list[dict[str, Any]],
        rates: tuple[RateFinding, ...],
    ) -> PeerComparison | None:
        """What others of the same kind did: as much, with the same value, or the same change."""
        kind, _, what = cause.partition(":")
        if kind == "rate":
            of_kind, first = entity.partition(":")[0], rates[0] if rates else None
            if first is None or not first.among:
                return None
            return PeerComparison(others.COUNT, f"{first.count}.{first.span}", of_kind, first.reached, first.among)
        if kind == "first" and (overlaps := self.bundle.scorer.overlaps) is not None:
            changed, among = overlaps.overlaps.changing(entity, AT_ONCE.tolist().index(cause))
            return PeerComparison(others.CHANGE, what, entity.partition(":")[0], changed, among) if among else None
        if cause == SILENCE:  # That its last event is usual is not the point.
            return None
        field = next((f for f in fields if f.path == what), fields[0] if fields else None) if kind == "record" else None
        path = field.path if field is not None and field.path != "type_uid" else ""
        codes = event.features.codes[event.row]
        new = field is not None and field.new
        return others.find(
            self.bundle,
            others.PeerQuery(entity, names, codes, path, event.raw(path), new, alike, len(alike) < EXAMPLES),
        )

    def _rates(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, tuple[RateFinding, ...]]:
        """Of those rows that a rate made alerts, the counts that their entity had raised beyond its habits by then."""
        told = [row for row in rows.tolist() if str(scored.cause[row]).startswith("rate:")]
        if self.bundle.scorer.rates is None or not told:
            return {}
        entities, causes = ([str(column[row]) for row in told] for column in (scored.entity, scored.cause))
        level = np.zeros(len(told), np.uint8) if scored.level is None else scored.level[told]
        causal = [LEVELS.index(cause.partition(":")[2]) for cause in causes]
        levels = much.levels(self.windows.latest(entities), scored.time[told])
        levels[np.arange(len(told)), causal] = level
        return dict(zip(told, much.findings(self.bundle.scorer.rates, entities, levels, causal), strict=True))

    def _timelines(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, tuple[Timeline, Likely]]:
        """Of those rows that a sequence made alerts, the last records of its window up to the event, each told by the
        normal event that it is most like, with what the window would lose without it; and what was expected instead.
        """
        told = [row for row in rows.tolist() if str(scored.cause[row]).startswith("sequence:")]
        if not told:
            return {}
        kept = np.isin(told, scored.in_sequence) if scored.in_sequence is not None else np.zeros(len(told), np.bool_)
        kept &= scored.cause[told] != SILENCE
        found = {}
        if kept.any() and scored.windows is not None and scored.in_sequence is not None:
            rows = np.array(told)[kept]
            found = self._told(scored, rows, scored.windows.take(np.searchsorted(scored.in_sequence, rows)))
        if not kept.all():  # A silence is of an event that may lie long back.
            rows = np.array(told)[~kept]
            windows = self.windows.latest([str(entity) for entity in scored.entity[rows]])
            upto = windows.mask & (windows.times <= scored.time[rows][:, None])
            ends = np.where(upto.any(1), upto.shape[1] - 1 - upto[:, ::-1].argmax(1), -1)
            found |= self._told(scored, rows, cut(windows, ends))
        return found

    def _told(
        self, scored: ScoredBatch, rows: NDArray[np.intp], windows: Windows
    ) -> dict[int, tuple[Timeline, Likely]]:
        """The same of some rows, with the windows as they were at these."""
        sequences = self.bundle.scorer.sequences
        if sequences is None:
            return {}
        kinds = np.array([KINDS.index(str(entity).partition(":")[0]) for entity in scored.entity[rows]], np.int8)
        cause = scored.cause[rows]
        weight = weights(sequences, windows, kinds, [_STATISTICS[each] for each in cause])
        asked = windows.vectors, windows.times, windows.length, kinds
        expected, absent = sequences.model.expected(*asked, cause == SILENCE), sequences.model.absent(*asked)
        instead = {ORDER: expected, SILENCE: expected, MISSING: absent}
        return {
            row: (
                self._timeline(windows, i, weight[i]),
                tuple((self._like(code), p) for code, p in (instead[cause[i]][i] if cause[i] in instead else ())),
            )
            for i, row in enumerate(rows.tolist())
        }

    def _timeline(self, windows: Windows, i: int, weight: NDArray[np.float64]) -> Timeline:
        sequences = self.bundle.scorer.sequences
        slots = np.flatnonzero(windows.mask[i])[-LATEST:]
        if sequences is None or not len(slots):
            return ()
        codes = sequences.model.codebook(windows.vectors[i, slots]).tolist()
        return tuple(
            (int(windows.times[i, slot]), self._coordinates(windows, i, slot), self._like(code), float(weight[slot]))
            for slot, code in zip(slots.tolist(), codes, strict=True)
        )

    def _like(self, code: int) -> dict[str, Any]:
        """What records of a window of this outcome have in common, which names nobody."""
        known = self.bundle.anonymised
        found: dict[str, Any] = orjson.loads(known[code]) if code < len(known) else {}
        return found

    @staticmethod
    def _coordinates(windows: Windows, i: int, slot: int) -> str:
        topic, partition = windows.sources[windows.source[i, slot]]
        return f"{topic}:{partition}:{windows.offset[i, slot]}:{windows.index[i, slot]}"

    def _fields(self, event: _Event, near: list[dict[str, Any]], cause: str) -> tuple[FieldFinding, ...]:
        """The fields that mattered, one of each group: the cause, then by how surprising the counts or the network find
        them."""
        encoder = self.bundle.encoder
        fields = encoder.schema.fields
        codes = event.features.codes[event.row]
        by_type, by_actor = (
            dict(zip(encoder.rarity.columns, nats[event.row].tolist(), strict=True))
            for nats in (event.surprise.by_type, event.surprise.by_actor)
        )
        # Of an actor that hardly ever does this, every value is a little odd: that is told once, of the type of event.
        hardly_ever = min(by_actor.values())
        by_actor = {i: nats if i == 0 else nats - hardly_ever for i, nats in by_actor.items()}
        counted = {i: max(by_type[i], by_actor[i]) for i in by_type}
        numbers = [i for i, f in enumerate(fields) if f.kind == "number" and codes[i]]
        likely = sorted(counted, key=lambda i: -counted[i])[: 2 * EXPLAINED_FIELDS]
        named = [i for i in counted if f"record:{fields[i].path}" == cause and i not in likely]
        expectations = encoder.expectations(event.features, event.row, np.array(likely + named + numbers, np.int32))
        told = {e.field: max(e.surprise, counted.get(e.field, 0.0)) for e in expectations}
        present = {field.path for field, code in zip(fields, codes.tolist(), strict=True) if code}
        actor = event.value(next((path for path in encoder.schema.actors if path in present), ""))
        findings: list[FieldFinding] = []
        columns, twins = encoder.rarity.columns, encoder.rarity.groups[int(codes[0])].tolist()
        group_of = {i: fields[columns[twin]].group for i, twin in zip(columns, twins, strict=True)}
        groups: set[str] = set()
        first = {e for e in told if f"record:{fields[e].path}" == cause and told[e] >= WORTH_TELLING}
        for e in sorted(expectations, key=lambda e: (e.field not in first, -told[e.field])):
            field_, code = fields[e.field], int(codes[e.field])
            group = group_of.get(e.field, field_.group)
            if group in groups or field_.name.startswith("#") or (findings and told[e.field] < WORTH_TELLING):
                continue
            groups.add(group)
            observed = event.value(field_.path)
            by_whom = by_actor.get(e.field, 0.0) > max(by_type.get(e.field, 0.0) + 1, e.surprise)
            given = actor if by_whom and actor != observed else ""
            new = code == UNKNOWN and not field_.left_out and not field_.came_later(event.raw(field_.path))
            # What the rarest word usually is explains no text.
            usual = e.expected if field_.derives != WORD else ()
            expected = tuple((self._example(e.field, text, near), p) for text, p in usual)
            findings.append(FieldFinding(field_.path, observed, expected, told[e.field], given, new))
            if len(findings) == EXPLAINED_FIELDS:
                break
        return tuple(findings)

    def _example(self, place: int, normalised: str, near: list[dict[str, Any]]) -> str:
        """What a value that is expected of a field (by its place) looks like before it is normalised: what near
        examples have in common, else any; else "…" stands for what stands for many values."""
        field = self.bundle.encoder.schema.fields[place]
        in_folder = field.derives == FOLDER
        if field.kind in ("number", "presence") or not normalised or (field.derives and not in_folder):
            return normalised

        def alike(examples: list[dict[str, Any]]) -> list[str]:
            values = {_shown(value): value for example in examples if (value := example.get(field.path)) is not None}
            texts = ((shown, normalise(value, field.path)) for shown, value in values.items())
            return [
                shown
                for shown, text in texts
                if (derived(text, FOLDER) == (normalised,) if in_folder else text == normalised)
            ]

        found = alike(near)
        if not found and normalised in field.values:
            code = FIRST + field.values.index(normalised)
            found = alike(others.read(self.bundle, np.flatnonzero(self.bundle.codes[place] == code), FEW))
        if found:
            return _common(field, found)
        text = _TEMPLATED.sub("…", normalised)
        return f"{text}/…" if in_folder else text


def _common(field: Field, texts: list[str]) -> str:
    """What values that are one once normalised have in common, with "…" for what varies; of a folder it is that."""
    if field.derives == FOLDER:
        ends = [max(text.rfind("/"), text.rfind("\\")) for text in texts]
        texts = [text[: end + 1] for text, end in zip(texts, ends, strict=True)]
    before = _beginning(texts)
    if field.derives == FOLDER or len(set(texts)) == 1:
        return f"{before}…" if field.derives == FOLDER else before
    before = before.rstrip("0123456789")
    after = _beginning([text[len(before) :][::-1] for text in texts])[::-1].lstrip("0123456789")
    return f"{before}…{after}"


def _beginning(texts: list[str]) -> str:
    """What all of these begin with."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
