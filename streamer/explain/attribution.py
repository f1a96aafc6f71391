"""Why events scored as they did, as data: the attributes that contributed most, the counts, the timeline of the window
and the nearest normal events.

It runs for events that become alerts, a few at a time. Promises to read only the bundle, the event and its entity's
window. It does not write sentences (`streamer.alerting.text`) and does not redact (`streamer.redaction`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.features.normalization import FOLDER, WORD, derived, normalise
from encoder.features.schema import FIRST, UNKNOWN, Field
from encoder.features.schema import MISSING as MISSING_VALUE
from encoder.features.vectorizer import FeatureBatch
from encoder.models.contextual_numbers import USUAL_SHARE, JudgedNumbers
from encoder.models.rarity import Surprise
from encoder.models.text_shapes import TextFinding
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import KINDS
from encoder.ocsf.event_time import TimeBounds
from encoder.ocsf.events import EventBatch, Message
from state.rolling_counts import LEVELS
from state.windows import Windows, WindowStore
from streamer.detection.cooccurrence_score import CAUSES as COOCCURRENCE_CAUSES
from streamer.detection.inactivity import CAUSE as INACTIVITY
from streamer.detection.record_score import NEAR
from streamer.detection.sequence_score import MISSING, ORDER
from streamer.explain import peer_comparison
from streamer.explain import rates as rate_attribution
from streamer.explain.expected_values import Expected, as_range, expected_values, tail, usual_range
from streamer.explain.leave_one_out import LATEST, cut, weights
from streamer.explain.peer_comparison import PeerComparison
from streamer.explain.rates import RateFinding
from streamer.explain.stretch import StretchFinding
from streamer.explain.stretch import findings as stretch_findings
from streamer.redaction import MASK

if TYPE_CHECKING:
    from streamer.detection.batches import ScoredBatch
    from streamer.detection.bundle import Bundle


Timeline = tuple[tuple[int, str, dict[str, Any], float], ...]
Stretch = tuple[StretchFinding, tuple[tuple[dict[str, Any], int, int], ...]]
Likely = tuple[tuple[dict[str, Any], float], ...]


@dataclass(frozen=True)
class FieldFinding:
    """One attribute that contributed: the observed value, the expected values with their probabilities, -log p in nats.

    given: the actor, where the value is more surprising for this actor than for events of this type (else ""); new: the
    value did not occur in training; of: what a number is of, where it is more surprising given that (the values of the
    one or two attributes that explain it); part: of a text, the part that is the most unusual for its place.
    """

    path: str
    observed: str
    expected: tuple[tuple[str, float], ...]
    surprise: float
    given: str = ""
    new: bool = False
    of: tuple[str, ...] = ()
    part: TextFinding | None = None


@dataclass(frozen=True)
class Explanation:
    """Why one event is an alert, strongest reason first.

    fields: at most five. neighbours: the nearest normal events, nearest first, each a compact redacted copy (path ->
    value; `@event` holds its coordinates). distance, usual_distance: from this event, and from a typical normal event,
    to the nearest normal events. window: for a sequence, one entry for each of its events, oldest first: event time in
    ms, coordinates, a similar normal event (path -> value; empty: none), and the share of the window's surprise that
    goes away without this event. instead: for a sequence, the normal events that were expected in place of the newest
    (for inactivity: after it), with their probabilities, most likely first. rates: for a rate, the count that caused
    the alert and other high counts; else empty. peers: what peers of the entity did in training (None: not known).
    stretch: what the entity did in its window against the nearest normal window, with the normal events of the codes
    that differ and how often each came here and there (None: it is not worth telling).
    """

    fields: tuple[FieldFinding, ...]
    neighbours: tuple[dict[str, Any], ...]
    distance: float
    usual_distance: float
    window: Timeline = ()
    instead: Likely = ()
    rates: tuple[RateFinding, ...] = ()
    peers: PeerComparison | None = None
    stretch: Stretch | None = None


EXPLAINED_FIELDS = 5
EXPLAINED_NEIGHBOURS = 3
EXAMPLES = 32
"""Nearest normal events that are searched for original spellings of an expected value: the schema keeps it normalised.
"""
FEW = 8
"""Examples that are read to spell out an expected value that none of the nearest normal events has."""
WORTH_TELLING = 1.5
"""Nats: a value that is expected more often than one time in four or five explains nothing."""
_STATISTICS = {ORDER: "order", MISSING: "missing", INACTIVITY: "ending"}
"""The score of `SequenceScorer.raw` that each cause is based on."""
_TEMPLATED = re.compile(r"\{\}|#|\*")
"""Placeholders that `normalise` puts in place of ids, hexadecimal numbers and owners of home folders."""


@dataclass(frozen=True)
class _Event:
    """One of the events that are explained together; `row` is its row in their arrays. replaced: float32 [fields]
    (`RecordEncoder.replaced_fields`)."""

    events: EventBatch
    features: FeatureBatch
    surprise: Surprise
    replaced: NDArray[np.float32]
    numbers: JudgedNumbers
    row: int

    def raw(self, path: str) -> Any:
        """The value at an attribute path; None where the event has none."""
        column = self.events.columns.get(path)
        at = int(np.searchsorted(column.rows, self.row)) if column is not None else 0
        there = column is not None and at < len(column.rows) and column.rows[at] == self.row
        return column.values[at] if column is not None and there else None

    def value(self, path: str) -> str:
        """The value at an attribute path as text; "" where the event has none."""
        value = self.raw(path)
        return "" if value is None else _as_text(value)


class Explainer:
    """Explains scored events, with the bundle and the windows that they were scored with."""

    def __init__(self, bundle: Bundle, windows: WindowStore) -> None:
        self.bundle, self.windows = bundle, windows

    def explain(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> list[Explanation]:
        """The explanations of `rows` (intp [r]), one a row. Each model runs once over all of them. This costs
        milliseconds an event, so call it for alerts only."""
        if not len(rows):
            return []
        encoder, record = self.bundle.encoder, self.bundle.scorer.record
        raw = [orjson.dumps(scored.records[row]) for row in rows.tolist()]
        scored_at = [TimeBounds(time, time, time) for time in scored.time[rows].tolist()]
        events, _ = decode(
            [Message("", 0, i, -1, event, bounds=at) for i, (at, event) in enumerate(zip(scored_at, raw, strict=True))]
        )
        features = encoder.vectorize(events)
        surprise, numbers = encoder.rarity(features), encoder.numbers.judge(features)
        distances, places = record.baseline.search(encoder.vectors(features), EXAMPLES)
        replaced = encoder.replaced_fields(features)
        usual = _typical(record.calibrations[NEAR].scores)
        timelines, rates = self._timelines(scored, rows), self._rates(scored, rows)
        stretches = self._stretches(scored, rows)
        named = peer_comparison.names_in(events)
        explanations = []
        for i, row in enumerate(rows.tolist()):
            near = [orjson.loads(self.bundle.exemplars[place]) for place in places[i].tolist()]
            similar = near[: int((distances[i] <= usual).sum())]
            event, cause, entity = (
                _Event(events, features, surprise, replaced[i], numbers, i),
                str(scored.cause[row]),
                str(scored.entity[row]),
            )
            fields, event_rates = self._fields(event, near, places[i], cause), rates.get(row, ())
            explanations.append(
                Explanation(
                    fields,
                    tuple(near[:EXPLAINED_NEIGHBOURS]),
                    float(distances[i, 0]),
                    usual,
                    *timelines.get(row, ((), ())),
                    event_rates,
                    self._peers(event, cause, entity, named[i], fields, similar, event_rates),
                    stretches.get(row),
                )
            )
        return explanations

    def _peers(
        self,
        event: _Event,
        cause: str,
        entity: str,
        names: peer_comparison.Names,
        fields: tuple[FieldFinding, ...],
        similar: list[dict[str, Any]],
        rates: tuple[RateFinding, ...],
    ) -> PeerComparison | None:
        """What peers did in training: reached the same count, had the same value, or made the same change."""
        part, _, what = cause.partition(":")
        if part == "rate":
            entity_kind, first = entity.partition(":")[0], rates[0] if rates else None
            if first is None or not first.among:
                return None
            return PeerComparison(
                peer_comparison.COUNT, f"{first.count}.{first.span}", entity_kind, first.reached, first.among
            )
        if part == "first" and (cooccurrence := self.bundle.scorer.cooccurrence) is not None:
            changed, among = cooccurrence.model.changing(entity, COOCCURRENCE_CAUSES.tolist().index(cause))
            return (
                PeerComparison(peer_comparison.CHANGE, what, entity.partition(":")[0], changed, among)
                if among
                else None
            )
        if cause == INACTIVITY:  # The last event is usual; that none followed is not, and examples do not show that.
            return None
        field = next((f for f in fields if f.path == what), fields[0] if fields else None) if part == "record" else None
        path = field.path if field is not None and field.path != "type_uid" else ""
        codes = event.features.codes[event.row]
        new = field is not None and field.new
        return peer_comparison.find(
            self.bundle,
            peer_comparison.PeerQuery(
                entity, names, codes, path, event.raw(path), new, similar, len(similar) < EXAMPLES
            ),
        )

    def _rates(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, tuple[RateFinding, ...]]:
        """For the rows whose cause is a rate: by row, the counts of their entity that were above its usual rates."""
        selected = [row for row in rows.tolist() if str(scored.cause[row]).startswith("rate:")]
        if self.bundle.scorer.rates is None or not selected:
            return {}
        entities, causes = ([str(column[row]) for row in selected] for column in (scored.entity, scored.cause))
        level = np.zeros(len(selected), np.uint8) if scored.level is None else scored.level[selected]
        causal = [LEVELS.index(cause.partition(":")[2]) for cause in causes]
        levels = rate_attribution.levels(self.windows.latest(entities), scored.time[selected])
        levels[np.arange(len(selected)), causal] = level
        return dict(
            zip(selected, rate_attribution.findings(self.bundle.scorer.rates, entities, levels, causal), strict=True)
        )

    def _timelines(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, tuple[Timeline, Likely]]:
        """For the rows whose cause is a sequence: by row, the timeline of the window up to the event, and the normal
        events that were expected instead (see `Explanation.window` and `Explanation.instead`)."""
        selected = [row for row in rows.tolist() if str(scored.cause[row]).startswith("sequence:")]
        if not selected:
            return {}
        kept = (
            np.isin(selected, scored.in_sequence)
            if scored.in_sequence is not None
            else np.zeros(len(selected), np.bool_)
        )
        kept &= scored.cause[selected] != INACTIVITY
        timelines = {}
        if kept.any() and scored.windows is not None and scored.in_sequence is not None:
            rows = np.array(selected)[kept]
            timelines = self._timelines_of(scored, rows, scored.windows.take(np.searchsorted(scored.in_sequence, rows)))
        if not kept.all():  # The last event before an inactivity may be old: its window is not in this batch.
            rows = np.array(selected)[~kept]
            timelines |= self._timelines_of(scored, rows, self._latest(scored, rows))
        return timelines

    def _latest(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> Windows:
        """What is left of the windows of some rows, up to the time of each row."""
        windows = self.windows.latest([str(entity) for entity in scored.entity[rows]])
        upto = windows.mask & (windows.times <= scored.time[rows][:, None])
        ends = np.where(upto.any(1), upto.shape[1] - 1 - upto[:, ::-1].argmax(1), -1)
        return cut(windows, ends)

    def _stretches(self, scored: ScoredBatch, rows: NDArray[np.intp]) -> dict[int, Stretch]:
        """For the rows with a window that is unlike normal ones: by row, how it differs from the nearest normal one."""
        scorer, unusual = self.bundle.scorer.stretch, scored.stretches
        if scorer is None or unusual is None:
            return {}
        at = np.flatnonzero(np.isin(unusual.row, rows))
        entities = unusual.entity[at]
        found = stretch_findings(scorer, unusual.windows.take(at), entities.tolist(), _kinds(entities))
        return {
            row: (finding, tuple((self._like(code), here, there) for code, here, there in finding.differing))
            for row, finding in zip(unusual.row[at].tolist(), found, strict=True)
        }

    def _timelines_of(
        self, scored: ScoredBatch, rows: NDArray[np.intp], windows: Windows
    ) -> dict[int, tuple[Timeline, Likely]]:
        """Timelines and expected events of some rows; windows: as they were at those events."""
        sequences = self.bundle.scorer.sequences
        if sequences is None:
            return {}
        kinds, cause = _kinds(scored.entity[rows]), scored.cause[rows]
        losses = weights(sequences, windows, kinds, [_STATISTICS[each] for each in cause])
        inputs = windows.vectors, windows.times, windows.length, kinds
        expected, absent = sequences.model.expected(*inputs, cause == INACTIVITY), sequences.model.absent(*inputs)
        instead = {ORDER: expected, INACTIVITY: expected, MISSING: absent}
        return {
            row: (
                self._timeline(windows, i, losses[i]),
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
        """The anonymised normal event of a code of the codebook; empty where it has none."""
        anonymised = self.bundle.anonymised
        example: dict[str, Any] = orjson.loads(anonymised[code]) if code < len(anonymised) else {}
        return example

    @staticmethod
    def _coordinates(windows: Windows, i: int, slot: int) -> str:
        topic, partition = windows.sources[windows.source[i, slot]]
        return f"{topic}:{partition}:{windows.offset[i, slot]}:{windows.index[i, slot]}"

    def _fields(
        self, event: _Event, near: list[dict[str, Any]], places: NDArray[np.int64], cause: str
    ) -> tuple[FieldFinding, ...]:
        """The fields that contributed, at most one of each group: the field of the cause first, then by surprise (the
        larger of counts and network). near, places: the nearest normal events, and their places among the exemplars."""
        encoder = self.bundle.encoder
        fields = encoder.schema.fields
        codes = event.features.codes[event.row]
        by_type, by_actor = (
            dict(zip(encoder.rarity.columns, surprises[event.row].tolist(), strict=True))
            for surprises in (event.surprise.by_type, event.surprise.by_actor)
        )
        # Where an actor rarely does this, every value is a little unusual for it. Report that once, for the event type.
        hardly_ever = min(by_actor.values())
        by_actor = {i: surprises if i == 0 else surprises - hardly_ever for i, surprises in by_actor.items()}
        by_network = event.replaced.tolist()
        surprises = {i: max(by_type[i], by_actor[i], by_network[i]) for i in by_type}
        far = {}
        for place, i in enumerate(i for i, field in enumerate(fields) if field.kind == "number"):
            if codes[i] != MISSING_VALUE:
                readable = codes[i] >= FIRST
                far[i] = tail(fields[i], float(event.features.quantiles[event.row, place])) if readable else 0.0
                surprises[i] = max(by_network[i], far[i])
        in_context = {i: each for i, each in self._numbers_in_context(event) if each.surprise > surprises[i]}
        surprises |= {i: each.surprise for i, each in in_context.items()}
        present = {field.path for field, code in zip(fields, codes.tolist(), strict=True) if code}
        actor = event.value(next((path for path in encoder.schema.actors if path in present), ""))
        findings: list[FieldFinding] = []
        columns, twins = encoder.rarity.columns, encoder.rarity.groups[int(codes[0])].tolist()
        group_of = {i: fields[columns[twin]].group for i, twin in zip(columns, twins, strict=True)}
        groups: set[str] = set()
        first = {i for i in surprises if f"record:{fields[i].path}" == cause and surprises[i] >= WORTH_TELLING}
        for i in sorted(surprises, key=lambda i: (i not in first, -surprises[i])):
            field_, code = fields[i], int(codes[i])
            group = group_of.get(i, field_.group)
            if group in groups or field_.name.startswith("#") or (findings and surprises[i] < WORTH_TELLING):
                continue
            groups.add(group)
            observed = event.value(field_.path)
            if (number := in_context.get(i)) is not None:
                findings.append(replace(number, path=field_.path, observed=observed))
                continue
            unusual_for_actor = by_actor.get(i, 0.0) > max(by_type.get(i, 0.0) + 1, by_network[i])
            given = actor if unusual_for_actor and actor != observed else ""
            known = bool(field_.left_out) or observed == MASK or field_.came_later(event.raw(field_.path))
            new = code == UNKNOWN and not known
            # The usual rarest word does not explain a text.
            usual: Expected = ()
            if field_.derives != WORD:
                usual = self._expected(i, code, near, places, far.get(i, 0.0) > by_network[i])
            expected = tuple((self._example(i, text, near), p) for text, p in usual)
            findings.append(FieldFinding(field_.path, observed, expected, surprises[i], given, new))
        part = self.bundle.scorer.record.texts.worst(event.events, event.row)
        if part is not None and part.surprise >= WORTH_TELLING:
            findings = _with_part(findings, part, event.value(part.path), cause)
        return tuple(findings[:EXPLAINED_FIELDS])

    def _numbers_in_context(self, event: _Event) -> Iterator[tuple[int, FieldFinding]]:
        """By field, the numbers of an event that are judged by what they are of."""
        model, judged = self.bundle.encoder.numbers, event.numbers
        for at in np.flatnonzero(judged.row == event.row).tolist():
            table, field = int(judged.table[at]), int(model.fields[judged.number[at]])
            paths = [self.bundle.encoder.schema.fields[i].path for i in model.attributes(table)]
            of = tuple(filter(None, (event.value(path) for path in paths)))
            usual = as_range(*model.usual[table].tolist())
            yield field, FieldFinding("", "", ((usual, USUAL_SHARE),), float(judged.surprise[at]), of=of)

    def _expected(
        self, place: int, code: int, near: list[dict[str, Any]], places: NDArray[np.int64], far: bool
    ) -> Expected:
        """What a field (by its place) was expected to be; far: by all events, not by the nearest ones. An exemplar
        whose value is masked does not count."""
        field = self.bundle.encoder.schema.fields[place]
        if far:
            return usual_range(field)
        codes = self.bundle.codes[place, places].astype(np.int64)
        masked = [not code and field.path in example for code, example in zip(codes.tolist(), near, strict=True)]
        return expected_values(field, code, codes[~np.array(masked, np.bool_)])

    def _example(self, place: int, normalised: str, near: list[dict[str, Any]]) -> str:
        """An expected value of a field (by its place) as it looks before normalisation: the common part of the nearest
        examples that have it, else of any examples; else the normalised text with "…" for its placeholders."""
        field = self.bundle.encoder.schema.fields[place]
        in_folder = field.derives == FOLDER
        if field.kind in ("number", "presence") or not normalised or (field.derives and not in_folder):
            return normalised

        def alike(examples: list[dict[str, Any]]) -> list[str]:
            values = {_as_text(value): value for example in examples if (value := example.get(field.path)) is not None}
            texts = ((shown, normalise(value, field.path)) for shown, value in values.items())
            return [
                shown
                for shown, text in texts
                if (derived(text, FOLDER) == (normalised,) if in_folder else text == normalised)
            ]

        matches = alike(near)
        if not matches and normalised in field.values:
            code = FIRST + field.values.index(normalised)
            matches = alike(peer_comparison.read(self.bundle, np.flatnonzero(self.bundle.codes[place] == code), FEW))
        if matches:
            return _common(field, matches)
        text = _TEMPLATED.sub("…", normalised)
        return f"{text}/…" if in_folder else text


def _with_part(findings: list[FieldFinding], part: TextFinding, observed: str, cause: str) -> list[FieldFinding]:
    """The findings, strongest first, with the unusual part of a text: first where it is the cause."""
    of_path = [f for f in findings if f.path == part.path] or [FieldFinding(part.path, observed, (), part.surprise)]
    named = replace(of_path[0], part=part, surprise=max(of_path[0].surprise, part.surprise))
    others = [f for f in findings if f.path != part.path]
    if cause == f"record:{part.path}":
        return [named, *others]
    place = next((i for i, f in enumerate(others) if i and f.surprise < named.surprise), len(others))
    return [*others[:place], named, *others[place:]]


def _kinds(entities: NDArray[np.object_]) -> NDArray[np.int8]:
    """int8 [m]: the kind of each entity (`kind:value`), its place in `KINDS`."""
    return np.array([KINDS.index(str(entity).partition(":")[0]) for entity in entities], np.int8)


def _common(field: Field, texts: list[str]) -> str:
    """The common part of values that are equal once normalised, with "…" for what varies; for a folder, its path."""
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
    """The longest common prefix."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _typical(distances: NDArray[np.float64]) -> float:
    """The median of the distances that are not zero: most normal events are exactly like one of training."""
    apart = distances[distances > 0]
    return float(np.median(apart)) if len(apart) else 0.0


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
