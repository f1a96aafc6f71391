"""Numbers given what they are of: how unusual a quantity is for the operation, service, container, actor or kind of
object that its event names. A duration may be usual for one operation and unheard of for another.

`fit` finds for each number of an event type (a class and its activity) the attribute, or the two, that narrow its
spread most, judged on a later part of training than the one that the levels come from: attributes whose values change
with time do not win. Where little is known of a value, its numbers are judged as those of the type are. Promises to
judge only event types whose numbers are explained by type and attributes, the same result in any batches, and bounded
memory. It extrapolates nothing: beyond all that training had, every number is equally unusual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoder.features.normalization import FOLDER, NETWORK
from encoder.features.schema import FIRST, OF_PRODUCT, Schema
from encoder.features.vectorizer import FeatureBatch

EXPLAINED = 0.5
"""An event type is judged where it and its best attributes leave at most this share of the spread that its numbers have
over their class, on average. On other types most contexts say nothing about most numbers, and would only add noise."""
MIN_NARROWING = 0.05
"""An attribute has to narrow the spread by this share, to be taken as a context, and to be taken as the second."""
PRIOR_EVENTS = 2.0
"""The level of a context counts as much as that of what it is part of once it has so many events."""
MIN_EVENTS = 200
"""Events with a number that an event type needs to be judged."""
MIN_CONTEXT = 5
"""Events that a context needs to be kept by itself."""
MAX_RULES, MAX_CONTEXTS, MAX_TABLES = 4096, 512, 16_384
"""The most numbers that are judged, contexts of one number (those with the most events), and contexts of all: 11 MB."""
LEARNED, SEARCHED = 262_144, 8192
"""Distinct events of a type, drawn by chance, from which its levels are learned, and its contexts are chosen."""
LEVEL_BLOCKS = 4 / 7
"""The share of the blocks of time, the first ones, that levels are learned from while contexts are chosen."""

_OWN = np.array([0, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99, 0.997, 1])
_OF_TYPE = np.array([0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999, 1])
"""Shares of the events of a context, and of its type, at whose quantiles the surprise of a context is kept."""
POINTS = len(_OWN) + len(_OF_TYPE)  # A power of two, for the bisection.
USUAL_SHARE = 0.9
"""The share of the events of a context that its usual range holds."""
_USUAL = np.array([(1 - USUAL_SHARE) / 2, (1 + USUAL_SHARE) / 2])
_OUTCOME = re.compile(r"(^|[._])(status|severity|disposition|rcode)|^http_response\.")
"""Attributes that say how something went, as its numbers do, and not what they are of."""
_NAME = re.compile(r"(^|[._])(id|uid|port)$")
"""Attributes whose integers name something. Others are small numbers themselves."""
_NO_ATTRIBUTE = -1


@dataclass(frozen=True)
class JudgedNumbers:
    """m numbers of n events that have a context or a type to judge them by.

    row: intp [m], ascending, the event; number: intp [m], its place among the numbers; table: intp [m], what it is
    judged by; surprise: float64 [m], nats, -log of how often a number is at least as far out, on its side.
    """

    row: NDArray[np.intp]
    number: NDArray[np.intp]
    table: NDArray[np.intp]
    surprise: NDArray[np.float64]


class ContextualNumbers:
    """Tail probabilities of numbers, for each event type and for each value of the attributes that explain them.

    rules: int32 [r, 4], for each number that is judged its event type (code), its place among the numbers, and the
    positions of the first and second attribute in the schema (-1: none); keys: int64 [c], ascending, the contexts: rule
    << 32 | code of the first attribute << 16 | 1 + code of the second (0: any). Of each of the r rules, then of each of
    the c contexts: points: float32 [r + c, POINTS], ascending values on the signed log scale; surprise: float32
    [r + c, 3, POINTS], nats, shortly below these points, at them, and shortly above them; usual: float32 [r + c, 2],
    the range of USUAL_SHARE of the events.
    """

    ARRAYS = ("rules", "keys", "points", "surprise", "usual")

    def __init__(
        self,
        schema: Schema,
        *,
        rules: NDArray[np.int32],
        keys: NDArray[np.int64],
        points: NDArray[np.float32],
        surprise: NDArray[np.float32],
        usual: NDArray[np.float32],
    ) -> None:
        self.rules, self.keys, self.points, self.surprise, self.usual = rules, keys, points, surprise, usual
        self.fields = np.array([i for i, field in enumerate(schema.fields) if field.kind == "number"], np.int32)
        self._rule_of = np.full((schema.fields[0].size, len(self.fields)), -1, np.intp)
        self._rule_of[rules[:, 0], rules[:, 1]] = np.arange(len(rules))

    @classmethod
    def fit(
        cls, schema: Schema, features: FeatureBatch, in_block: NDArray[np.float64], *, seed: int
    ) -> ContextualNumbers:
        """features: n distinct rows; in_block: float64 [n, blocks], the number of training events of each row in each
        block of time; seed: draws the rows that contexts are chosen from."""
        rng = np.random.default_rng(seed)
        attributes = _attributes(schema)
        learned, searched = {}, {}
        for kind in np.unique(features.codes[:, 0]).tolist():
            learned[kind] = rng.permutation(np.flatnonzero(features.codes[:, 0] == kind))[:LEARNED]
            searched[kind] = learned[kind][:SEARCHED]
        classes = {kind: _class_of(schema, kind) for kind in searched}
        spreads = {}
        for each in set(classes.values()):
            rows = np.concatenate([rows for kind, rows in searched.items() if classes[kind] == each])
            spreads[each] = _spreads(features.take(rows), in_block[rows])
        chosen = []
        for kind, rows in searched.items():
            contexts = _choose(features.take(rows), in_block[rows], attributes, spreads[classes[kind]])
            chosen += [(kind, number, *context) for number, context in contexts.items()]
        if not chosen:
            return cls.none(schema)
        rules = np.array(chosen[:MAX_RULES], np.int32)  # The most frequent types first.
        contexts_each = min(MAX_CONTEXTS, MAX_TABLES // len(rules))
        of_types, of_contexts, keys = [], [], []
        for place, (kind, number, first, second) in enumerate(rules.tolist()):
            rows = learned[kind][~np.isnan(features.numbers[learned[kind], number])]
            x, weights = features.numbers[rows, number].astype(np.float64), in_block[rows].sum(1)
            whole = _Tail(x, weights, None)
            of_types.append(whole.table(whole))
            if first == _NO_ATTRIBUTE:
                continue
            for key, tail in _contexts(features.codes[rows], x, weights, first, second, whole, contexts_each):
                keys.append(place << 32 | key)
                of_contexts.append(tail.table(whole))
        order = np.argsort(np.array(keys, np.int64), kind="stable")
        tables = [*of_types, *(of_contexts[i] for i in order.tolist())]
        points, surprise, usual = (np.array(column, np.float32) for column in zip(*tables, strict=True))
        return cls(
            schema,
            rules=rules,
            keys=np.array(keys, np.int64)[order],
            points=points,
            surprise=surprise,
            usual=usual,
        )

    @classmethod
    def none(cls, schema: Schema) -> ContextualNumbers:
        """A model that judges nothing."""
        return cls(
            schema,
            rules=np.empty((0, 4), np.int32),
            keys=np.empty(0, np.int64),
            points=np.empty((0, POINTS), np.float32),
            surprise=np.empty((0, 3, POINTS), np.float32),
            usual=np.empty((0, 2), np.float32),
        )

    def judge(self, features: FeatureBatch) -> JudgedNumbers:
        """Every number of n events that has a rule."""
        kinds = features.codes[:, 0]
        row, number = np.nonzero((self._rule_of[kinds] >= 0) & ~np.isnan(features.numbers))
        rule = self._rule_of[kinds[row], number]
        table = self._tables(features.codes, row, rule)
        x = features.numbers[row, number]
        up_to = self._points_up_to(x, table)
        low, high = np.maximum(up_to - 1, 0), np.minimum(up_to, POINTS - 1)
        points, surprise = self.points.ravel(), self.surprise.ravel()
        first, place = table * POINTS, table * (3 * POINTS)
        start = points[first + low]
        span = points[first + high] - start
        part = (x - start) / np.where(span > 0, span, 1)
        below, at, above = surprise[place + high], surprise[place + POINTS + low], surprise[place + 2 * POINTS + low]
        found = np.where(up_to == 0, below, np.where(up_to == POINTS, above, above + (below - above) * part))
        return JudgedNumbers(row, number, table, np.where(x == start, at, found).astype(np.float64))

    def _points_up_to(self, x: NDArray[np.float32], table: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [m]: how many points of its table each number reaches, by bisection."""
        points, first = self.points.ravel(), table * POINTS
        found = np.zeros(len(x), np.intp)
        step = POINTS // 2
        while step:
            found += step * (points[first + found + step - 1] <= x)
            step //= 2
        last = points[first + found] <= x
        return np.asarray(found + last, np.intp)

    def _tables(self, codes: NDArray[np.int32], row: NDArray[np.intp], rule: NDArray[np.intp]) -> NDArray[np.intp]:
        """intp [m]: the most specific table of each number: of both attributes, of the first, or of the type."""
        table = rule.copy()
        first, second = self.rules[rule, 2], self.rules[rule, 3]
        key = rule.astype(np.int64) << 32 | codes[row, first].astype(np.int64) << 16
        for has, whole in (
            (first != _NO_ATTRIBUTE, key),
            (second != _NO_ATTRIBUTE, key | (1 + codes[row, second].astype(np.int64))),
        ):
            rows = np.flatnonzero(has)
            at = np.minimum(np.searchsorted(self.keys, whole[rows]), max(len(self.keys) - 1, 0))
            known = self.keys[at] == whole[rows] if len(self.keys) else np.zeros(len(rows), np.bool_)
            table[rows[known]] = len(self.rules) + at[known]
        return table

    def summary(self, judged: JudgedNumbers, n: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """float64 [n], nats: the numbers of each event together, by Fisher's method: -log of how often as many
        independent numbers are as unusual together, NaN where none is judged; int32 [n]: the field of the number that
        is the most unusual, -1 where none is judged."""
        total = np.asarray(np.bincount(judged.row, judged.surprise, n), np.float64)
        count = np.bincount(judged.row, minlength=n)
        strangest = np.full(n, -1, np.int32)
        if len(self.rules):
            surprise = np.full((n, len(self.fields)), -1.0)
            surprise[judged.row, judged.number] = judged.surprise
            strangest = np.where(count > 0, self.fields[surprise.argmax(1)], -1).astype(np.int32)
        return np.where(count > 0, _fisher(total, count), np.nan), strangest

    def attributes(self, table: int) -> tuple[int, ...]:
        """The positions in the schema of the attributes whose values chose a table: none for that of an event type, one
        or two for that of a context."""
        if table < len(self.rules):
            return ()
        key = int(self.keys[table - len(self.rules)])
        first, second = self.rules[key >> 32, 2:].tolist()
        return (first, second) if key & 0xFFFF else (first,)


def _fisher(total: NDArray[np.float64], count: NDArray[np.intp]) -> NDArray[np.float64]:
    """-log P(sum of `count` exponential variables >= total), float64 [n]: total - log of the sum of total^i / i! for
    i < count."""
    total = np.minimum(total, 600.0)  # The sum stays finite.
    term, series = np.ones(len(total)), np.ones(len(total))
    for i in range(1, int(count.max(initial=0))):
        term = np.where(i < count, term * total / i, 0.0)
        series += term
    return np.maximum(total - np.log(series), 0.0)


class _Tail:
    """How often a number is at least so high, and at least so low, in one context: by its own events, and as if
    PRIOR_EVENTS more were as those of its parent (None: a type, which has none)."""

    def __init__(self, x: NDArray[np.float64], weights: NDArray[np.float64], parent: _Tail | None) -> None:
        order = np.argsort(x, kind="stable")
        self.x, self.parent = x[order], parent
        self._up_to = np.concatenate([[0.0], np.cumsum(weights[order])])
        self.events = float(self._up_to[-1])

    def quantiles(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        at = np.searchsorted(self._up_to[1:], shares * self.events, side="left")
        return self.x[np.minimum(at, len(self.x) - 1)]

    def below(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 [2, n]: P(X < x) and P(X <= x), as shares of 1 + all events; the rest is left for what never came."""
        counts = np.stack([self._up_to[np.searchsorted(self.x, x, side=side)] for side in ("left", "right")])
        if self.parent is None:
            return (counts + 0.5) / (self.events + 1)
        return (counts + PRIOR_EVENTS * self.parent.below(x)) / (self.events + PRIOR_EVENTS)

    def table(self, whole: _Tail) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Points, surprise and usual, as in `ContextualNumbers`; whole: the type."""
        points = np.sort(np.concatenate([self.quantiles(_OWN), whole.quantiles(_OF_TYPE)]))
        under, up_to = self.below(points)
        sides = ((1 - under, under), (1 - under, up_to), (1 - up_to, up_to))
        surprise = np.stack([0.0 - np.log(np.minimum(2 * np.minimum(high, low), 1.0)) for high, low in sides])
        return points, surprise, self.quantiles(_USUAL)


def _contexts(
    codes: NDArray[np.int32],
    x: NDArray[np.float64],
    weights: NDArray[np.float64],
    first: int,
    second: int,
    whole: _Tail,
    most: int,
) -> list[tuple[int, _Tail]]:
    """The contexts of one number that have enough events, at most so many, by the lower part of their key."""
    ones = codes[:, first].astype(np.int64)
    of_first = {code: _Tail(x[rows], weights[rows], whole) for code, rows in _groups(ones, weights, most).items()}
    found = [(code << 16, tail) for code, tail in of_first.items()]
    if second == _NO_ATTRIBUTE:
        return found
    both = ones << 16 | (1 + codes[:, second].astype(np.int64))
    for key, rows in _groups(both, weights, most - len(found)).items():
        if (parent := of_first.get(key >> 16)) is not None:
            found.append((key, _Tail(x[rows], weights[rows], parent)))
    return found


def _groups(keys: NDArray[np.int64], weights: NDArray[np.float64], most: int) -> dict[int, NDArray[np.intp]]:
    """The rows of each key with at least MIN_CONTEXT events, of the `most` with the most events."""
    distinct, place = np.unique(keys, return_inverse=True)
    events = np.bincount(place, weights)
    largest = np.argsort(-events, kind="stable")[: max(most, 0)]
    starts = np.searchsorted(np.sort(place), np.arange(len(distinct) + 1))
    order = np.argsort(place, kind="stable")
    return {
        int(distinct[i]): order[starts[i] : starts[i + 1]]
        for i in np.sort(largest).tolist()
        if events[i] >= MIN_CONTEXT
    }


def _attributes(schema: Schema) -> list[int]:
    """Positions of the fields that say what numbers are of: names and categories, no outcomes and no quantities."""
    return [
        position
        for position, field in enumerate(schema.fields)
        if position
        and field.kind in ("category", "identity")
        and field.derives in ("", FOLDER, NETWORK)
        and not field.name.startswith("#")
        and not _OUTCOME.search(field.path)
        and (_NAME.search(field.path) or not all(value.lstrip("-").isdecimal() for value in field.values))
    ]


def _class_of(schema: Schema, kind: int) -> tuple[str, str]:
    """The class of an event type, by its code, with the product where several fill the type; unknown types have one of
    their own."""
    if kind < FIRST:
        return "", ""
    type_uid, _, product = schema.fields[0].values[kind - FIRST].partition(OF_PRODUCT)
    return type_uid[:-2], product


def _early_and_late(in_block: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The events of each row that levels are learned from, and those that they are judged by: float64 [n] each."""
    before = max(1, int(LEVEL_BLOCKS * in_block.shape[1]))
    return in_block[:, :before].sum(1), in_block[:, before:].sum(1)


def _spreads(features: FeatureBatch, in_block: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [numbers]: the spread of each number over n events, 0 where it has none."""
    early, late = _early_and_late(in_block)
    spreads = np.zeros(features.numbers.shape[1])
    for number, x in enumerate(features.numbers.T.astype(np.float64)):
        there = ~np.isnan(x)
        if early[there].any() and late[there].any():
            spreads[number] = _Spread(x[there], early[there], late[there])(np.zeros(there.sum(), np.int64))
    return spreads


def _choose(
    features: FeatureBatch, in_block: NDArray[np.float64], attributes: list[int], over_class: NDArray[np.float64]
) -> dict[int, tuple[int, int]]:
    """For the rows of one event type: by number (its place), the one or two attributes that explain it (-1: none);
    empty where its numbers are not explained. over_class: float64 [numbers], the spread over its class."""
    early, late = _early_and_late(in_block)
    varied = [c for c in attributes if len(np.unique(features.codes[:, c])) > 1]
    # Of attributes that explain equally much, take the one with the fewest values.
    varied.sort(key=lambda c: len(np.unique(features.codes[:, c])))
    chosen: dict[int, tuple[int, int]] = {}
    left: list[float] = []
    for number in range(features.numbers.shape[1]):
        there = np.flatnonzero(~np.isnan(features.numbers[:, number]))
        if early[there].sum() + late[there].sum() < MIN_EVENTS or not (early[there].any() and late[there].any()):
            continue
        spread = _Spread(features.numbers[there, number].astype(np.float64), early[there], late[there])
        codes = features.codes[there].astype(np.int64)
        least = spread(np.zeros(len(there), np.int64))
        whole = max(least, float(over_class[number]))
        found: list[int] = []
        group = np.zeros(len(there), np.int64)
        while least > 0 and len(found) < 2:
            spreads = [(spread(group << 16 | codes[:, c]), place) for place, c in enumerate(varied) if c not in found]
            best, place = min(spreads, default=(np.inf, 0))
            if best > least * (1 - MIN_NARROWING):
                break
            least = best
            found.append(varied[place])
            group = codes[:, found[0]]
        first, second, *_ = *found, _NO_ATTRIBUTE, _NO_ATTRIBUTE
        chosen[number] = (first, second)
        if whole > 0:  # A constant needs no explanation.
            left.append(least / whole)
    explained = bool(left) and float(np.mean(left)) <= EXPLAINED
    return chosen if explained else {}


class _Spread:
    """The spread of one number around the levels of groups: the mean distance of later values to the median of the
    earlier ones of their group, which is drawn to that of all by PRIOR_EVENTS."""

    def __init__(self, x: NDArray[np.float64], early: NDArray[np.float64], late: NDArray[np.float64]) -> None:
        order = np.argsort(x, kind="stable")
        self._order, self._x, self._early, self._late = order, x[order], early[order], late[order]
        self._whole = float(self._x[np.searchsorted(np.cumsum(self._early), self._early.sum() / 2)])

    def __call__(self, group: NDArray[np.int64]) -> float:
        """group: int64 [n], of each value."""
        distinct, place = np.unique(group[self._order], return_inverse=True)
        by_group = np.argsort(place, kind="stable")  # Ascending values within each group.
        up_to = np.cumsum(self._early[by_group])
        events = np.bincount(place, self._early, len(distinct))
        before = np.cumsum(events) - events
        at = np.minimum(np.searchsorted(up_to, before + events / 2), len(place) - 1)
        own = self._x[by_group][at]
        level = (events * own + PRIOR_EVENTS * self._whole) / (events + PRIOR_EVENTS)
        return float(np.abs(self._x - level[place]) @ self._late / self._late.sum())
