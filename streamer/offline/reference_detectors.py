"""Reference detectors: simple, strong detectors that the evaluation runs on the same events.

Each is a function from (training events, test events) to one score for each event, higher meaning less normal; none
sees a label. They are for comparison only: they hold all events in memory and do not stream.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

Record = Mapping[str, Any]
Flat = dict[str, Any]
Scores = NDArray[np.float64]

MISSING = "∅"
FIT_ROWS = 20_000
"""Training rows given to the detectors whose cost grows faster than linearly."""
_IDENTITY = frozenset({"time", "metadata.uid", "metadata.correlation_uid"})
_NUMBERS_THAT_NAME = ("_id", "_uid", "port", "pid")


class ReferenceUnavailableError(Exception):
    """A reference detector cannot run: an optional package is missing, or the events are not of its kind."""


def flatten(record: Record) -> Flat:
    """Attribute path -> value; a list becomes the first 80 characters of its JSON, null is absence."""
    flat: Flat = {}
    stack = [("", iter(record.items()))]
    while stack:
        prefix, items = stack[-1]
        for key, value in items:
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", iter(value.items())))
                break
            if isinstance(value, list):
                flat[prefix + key] = json.dumps(value)[:80]
            elif value is not None:
                flat[prefix + key] = value
        else:
            stack.pop()
    return flat


@dataclass(frozen=True)
class Table:
    """Events as numbers, the shared preprocessing of the distance-based detectors.

    train: float32 [n, d], test: float32 [m, d]: log-scaled standardised numbers, unscaled one-hots of the 30 most
    common values of each category, one rarity column for each attribute; rarity: float64 [m, categories], -log of
    the frequency in training of a test event's value.
    """

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    rarity: Scores


def _is_quantity(path: str, values: Sequence[Any]) -> bool:
    return (
        not path.endswith(_NUMBERS_THAT_NAME)
        and all(type(v) is int or type(v) is float for v in values)
        and len(set(values)) > 20
    )


def _quantities(path: str, events: Sequence[Flat]) -> Scores:
    """Signed logarithms, float64 [n]; nan where the attribute is absent or (in a test set) not a number."""
    values = (event.get(path) for event in events)
    raw = np.array([v if type(v) is int or type(v) is float else np.nan for v in values], np.float64)
    return np.asarray(np.sign(raw) * np.log1p(np.abs(raw)))


def _category(event: Flat, path: str) -> Any:
    value = event.get(path, MISSING)
    return str(value) if type(value) is bool else value  # or True would be the same key as 1


def tabulate(train: Sequence[Record], test: Sequence[Record]) -> Table:
    """Turn events into a `Table`; the training events decide which attributes are quantities and which categories."""
    old, new = [flatten(r) for r in train], [flatten(r) for r in test]
    paths = [path for path, _ in Counter(k for e in old for k in e).most_common() if path not in _IDENTITY]
    quantities = {p for p in paths if _is_quantity(p, [e[p] for e in old if p in e])}
    train_columns: list[Scores] = []
    test_columns: list[Scores] = []
    for path in (p for p in paths if p in quantities):
        a, b = _quantities(path, old), _quantities(path, new)
        mean, spread = np.nanmean(a), np.nanstd(a) + 1e-6
        train_columns.append(np.nan_to_num((a - mean) / spread).clip(-10, 10))
        test_columns.append(np.nan_to_num((b - mean) / spread).clip(-10, 10))
    rare_train_columns: list[Scores] = []
    rare_test_columns: list[Scores] = []
    for path in (p for p in paths if p not in quantities):
        values = [_category(e, path) for e in old]
        common = Counter(values).most_common()
        code = {value: i for i, (value, _) in enumerate(common)}
        a_codes = np.array([code[v] for v in values])
        b_codes = np.array([code.get(_category(e, path), len(code)) for e in new], np.intp)
        counts = np.array([count for _, count in common] + [0])
        rarity = -np.log((counts + 0.5) / (len(old) + 1))
        rare_train_columns.append(rarity[a_codes])
        rare_test_columns.append(rarity[b_codes])
        if len(common) > 1:
            for i in range(min(30, int((counts >= 5).sum()))):
                train_columns.append((a_codes == i).astype(np.float64))
                test_columns.append((b_codes == i).astype(np.float64))
    rare_train = _columns(rare_train_columns, len(old))
    rare_test = _columns(rare_test_columns, len(new))
    scale = (rare_train.std() if rare_train.size else 0.0) + 1e-6
    return Table(
        np.hstack([_columns(train_columns, len(old)), rare_train / scale]).astype(np.float32),
        np.hstack([_columns(test_columns, len(new)), rare_test / scale]).astype(np.float32),
        rare_test,
    )


def _columns(columns: list[Scores], rows: int) -> Scores:
    """Columns side by side, each contiguous, so that equal columns have exactly equal variances."""
    return np.array(columns).T if columns else np.zeros((rows, 0))


def _sample(table: Table, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).permutation(len(table.train))[:FIT_ROWS]
    return np.asarray(table.train[rows])


def rarity_sum(table: Table, seed: int = 0) -> Scores:
    """The rarity of each value of the event, summed over attributes."""
    return np.asarray(table.rarity.sum(1))


def isolation_forest(table: Table, seed: int = 0) -> Scores:
    """Liu, Ting and Zhou 2008, 200 trees."""
    forest = IsolationForest(n_estimators=200, random_state=seed).fit(_sample(table, seed))
    return np.asarray(-forest.score_samples(table.test), np.float64)


def raw_knn(table: Table, seed: int = 0) -> Scores:
    """Mean distance to the five nearest of the distinct training rows: the detector to beat on clean data."""
    rows = np.unique(_sample(table, seed), axis=0)
    neighbours = NearestNeighbors(n_neighbors=min(5, len(rows)), n_jobs=-1).fit(rows)
    return np.asarray(neighbours.kneighbors(table.test)[0].mean(1), np.float64)


def local_outlier_factor(table: Table, seed: int = 0) -> Scores:
    """Breunig et al. 2000, 20 neighbours among the distinct training rows."""
    rows = np.unique(_sample(table, seed), axis=0)
    if len(rows) < 2:
        raise ReferenceUnavailableError("the training events are all alike")
    factor = LocalOutlierFactor(min(20, len(rows) - 1), novelty=True, n_jobs=-1).fit(rows)
    return np.asarray(-factor.score_samples(table.test), np.float64)


def half_space_trees(table: Table, seed: int = 0) -> Scores:
    """Tan, Ting and Liu 2011 as in River, on the 20 columns of greatest variance."""
    try:
        from river import anomaly
    except ImportError as error:
        raise ReferenceUnavailableError("river is not installed") from error
    low, high = table.train.min(0), table.train.max(0) + 1e-6
    keep = np.argsort(-table.train.var(0))[:20]
    trees: Any = anomaly.HalfSpaceTrees(n_trees=25, height=10, window_size=250, seed=seed + 1)
    for row in ((table.train - low) / (high - low))[:FIT_ROWS, keep].tolist():
        trees.learn_one(dict(enumerate(row)))
    scaled = ((table.test - low) / (high - low)).clip(0, 1)[:, keep].tolist()
    return np.array([trees.score_one(dict(enumerate(row))) for row in scaled], np.float64)


@lru_cache(maxsize=1 << 18)
def _template(text: str) -> str:
    text = re.sub(r"\{[0-9a-f-]{20,}\}", "{g}", text.lower())
    return re.sub(r"\d+", "0", re.sub(r"[0-9a-f]{8,}", "h", text))[:120]


def conditional_rarity(train: Sequence[Record], test: Sequence[Record]) -> Scores:
    """Mean of the three largest -log p(value | event type, acting process), plus -log p(event type | acting process).

    Values are lower-cased, their digits and ids templated; ports, pids and uids are left out.
    """
    counts: Counter[tuple[Any, Any]] = Counter()
    contexts: Counter[Any] = Counter()
    types: Counter[Any] = Counter()

    def context(event: Flat) -> tuple[str, Any]:
        return _template(str(event.get("actor.process.name", "?"))), event.get("type_uid")

    def items(event: Flat) -> list[tuple[str, str]]:
        return [
            (path, _template(str(value)))
            for path, value in event.items()
            if path not in _IDENTITY
            and not path.startswith("metadata")
            and path.rsplit(".", 1)[-1] not in ("uid", "pid", "port")
        ]

    for event in map(flatten, train):
        key = context(event)
        contexts[key] += 1
        types[key[1]] += 1
        counts.update((key, item) for item in items(event))
    scores = np.zeros(len(test))
    for row, event in enumerate(map(flatten, test)):
        key = context(event)
        rare = sorted(-np.log((counts[key, item] + 0.5) / (contexts[key] + 5)) for item in items(event))[-3:]
        scores[row] = (np.mean(rare) if rare else 0.0) - np.log((contexts[key] + 0.5) / (types[key[1]] + 5))
    return scores


def trigram(train: Sequence[Record], test: Sequence[Record]) -> Scores:
    """Rarity of an event code after the two before it in its sequence (`metadata.correlation_uid`, `event_code`)."""
    seen: Counter[tuple[Any, str]] = Counter()
    contexts: Counter[Any] = Counter()

    def steps(records: Sequence[Record]) -> list[tuple[tuple[str, str], str]]:
        last: dict[str, tuple[str, str]] = {}
        steps_ = []
        for record in records:
            metadata = record.get("metadata")
            metadata = metadata if isinstance(metadata, dict) else {}
            sequence, code = str(metadata.get("correlation_uid")), str(metadata.get("event_code"))
            before = last.get(sequence, ("^", "^"))
            steps_.append((before, code))
            last[sequence] = (before[1], code)
        return steps_

    if not _has_sequences(train):
        raise ReferenceUnavailableError("the events name no sequences (metadata.correlation_uid and event_code)")
    for before, code in steps(train):
        seen[before, code] += 1
        contexts[before] += 1
    return np.array([-np.log((seen[step] + 0.1) / (contexts[step[0]] + 10)) for step in steps(test)], np.float64)


def _has_sequences(records: Sequence[Record]) -> bool:
    def named(record: Record) -> bool:
        metadata = record.get("metadata")
        return isinstance(metadata, dict) and bool(metadata.get("correlation_uid") and metadata.get("event_code"))

    return sum(map(named, records)) * 2 > len(records)


OnTable = Callable[[Table, int], Scores]
OnEvents = Callable[[Sequence[Record], Sequence[Record]], Scores]

ON_TABLE: dict[str, OnTable] = {
    "rarity_sum": rarity_sum,
    "isolation_forest": isolation_forest,
    "raw_knn": raw_knn,
    "lof": local_outlier_factor,
    "half_space_trees": half_space_trees,
}
ON_EVENTS: dict[str, OnEvents] = {"conditional_rarity": conditional_rarity, "trigram": trigram}
