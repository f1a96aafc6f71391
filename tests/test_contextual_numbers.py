"""A number is judged given what it is of: the same duration is usual for one operation and an alert for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import alerts, check
from numpy.typing import NDArray
from test_vouching import features_of, spread

from encoder.features.schema import Schema
from encoder.features.vectorizer import FeatureBatch, Vectorizer
from encoder.models import contextual_numbers
from encoder.models.contextual_numbers import ContextualNumbers
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from state.memory.windows import MemoryWindows
from streamer.bundles.bundle_files import load
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector
from streamer.explain.attribution import Explainer
from streamer.training.fit import fit

START = 1_760_000_000_000
USUAL_MS = {"checkout": 150.0, "search": 4_000.0, "login": 30.0, "report": 60_000.0}
"""The usual duration of each operation; nine in ten lie within half and double of it."""

Json = dict[str, Any]


def call(operation: str, ms: float, i: int = 0, **more: Any) -> Json:
    return {
        "class_uid": 6003,
        "activity_id": 1,
        "time": START + i * 1000,
        "api": {"operation": operation},
        "duration": round(ms, 1),
        **more,
    }


def calls(n: int, seed: int = 0) -> Iterator[Json]:
    """Calls whose duration is that of their operation."""
    generator = np.random.default_rng(seed)
    for i in range(n):
        operation = str(generator.choice([*USUAL_MS]))
        yield call(operation, USUAL_MS[operation] * generator.lognormal(0, 0.4), i)


def fitted(events: list[Json]) -> tuple[Schema, ContextualNumbers]:
    schema, features = features_of(events)
    return schema, ContextualNumbers.fit(schema, features, spread(len(events)), seed=0)


def features_by(schema: Schema, events: list[Json]) -> FeatureBatch:
    batch, _ = decode([Message("t", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)])
    return Vectorizer(schema)(batch)


def judged(schema: Schema, model: ContextualNumbers, events: list[Json]) -> NDArray[np.float64]:
    """float64 [n], nats."""
    return model.summary(model.judge(features_by(schema, events)), len(events))[0]


def contexts(schema: Schema, model: ContextualNumbers) -> set[str]:
    return {schema.fields[i].name for i in model.rules[:, 2:].ravel().tolist() if i >= 0}


def test_a_duration_that_is_usual_for_one_operation_is_not_for_another() -> None:
    schema, model = fitted(list(calls(4000)))
    assert contexts(schema, model) == {"api.operation"}
    own, swapped = (
        judged(schema, model, [call(name, ms) for name, ms in pairs])
        for pairs in (USUAL_MS.items(), [("checkout", 4_000.0), ("search", 150.0), ("login", 4_000.0), ("report", 30)])
    )
    assert (own < 0.1).all() and (swapped > 6).all()


def test_high_and_low_are_unusual_by_how_often_they_came() -> None:
    schema, model = fitted(list(calls(20_000)))
    generator = np.random.default_rng(1)
    sample = [call("search", 4_000 * generator.lognormal(0, 0.4)) for _ in range(5000)]
    surprise = np.sort(judged(schema, model, sample))
    # -log of a uniform p: half of the events beyond log 2, a hundredth beyond log 100.
    assert np.quantile(surprise, 0.5) == pytest.approx(np.log(2), abs=0.1)
    assert np.quantile(surprise, 0.99) == pytest.approx(np.log(100), abs=0.6)


def test_a_value_with_little_history_is_judged_as_the_type_is() -> None:
    few = [call("export", 20_000 + i, 100 * i) for i in range(5)]
    schema, model = fitted(sorted([*calls(4000), *few], key=lambda event: event["time"]))
    never, little, much = judged(
        schema, model, [call("unheard", 4_000.0), call("export", 4_000.0), call("report", 4_000.0)]
    )
    assert never < 1 and never < little < 4 and much > 5
    table = model.judge(features_by(schema, [call("unheard", 1.0)])).table
    assert model.attributes(int(table[0])) == ()


def shifted(generator: np.random.Generator, i: int, pod: Callable[[str, int], str]) -> Json:
    """A sample of a container, of a service at its own level, in a pod with a name of the day."""
    service = str(generator.choice(["cart", "adverts", "mail", "search", "currency"]))
    level = {"cart": 50, "adverts": 500, "mail": 20, "search": 2000, "currency": 120}[service]
    return {
        "class_uid": 1008,
        "activity_id": 99,
        "time": START + i * 1000,
        "container": {"pod_name": pod(service, i)},
        "unmapped": {
            "memory_mib": level * generator.lognormal(0, 0.05),
            "net_bytes": 100 * level * generator.lognormal(0, 0.2),
        },
    }


def test_pods_of_the_same_deployments_keep_their_levels_when_they_are_renamed() -> None:
    generator = np.random.default_rng(0)
    schema, model = fitted([shifted(generator, i, lambda s, _: f"{s}-7d9f8b6c54-x2b7q") for i in range(3000)])
    assert contexts(schema, model) == {"container.pod_name"}
    after = [shifted(generator, i, lambda s, _: f"{s}-5f6585d649-fnmft") for i in range(500)]
    usual = judged(schema, model, after)
    assert np.quantile(usual, 0.9) < 4
    moved = next(event for event in after if event["container"]["pod_name"].startswith("cart"))
    moved["unmapped"]["memory_mib"] = 500.0  # That of another service.
    assert judged(schema, model, [moved])[0] > 6


def test_an_attribute_whose_values_change_explains_nothing() -> None:
    generator = np.random.default_rng(0)
    # Each name is of one service and lives for a fourteenth of the time.
    letters = "abcdefghijklmn"
    schema, model = fitted([shifted(generator, i, lambda s, i: f"{letters[i * 14 // 3000]}x-{s}") for i in range(3000)])
    assert not len(model.rules) and np.isnan(judged(schema, model, [shifted(generator, 0, lambda s, _: s)])).all()


def test_numbers_that_no_attribute_explains_are_not_judged() -> None:
    generator = np.random.default_rng(0)
    events = [call(str(generator.choice([*USUAL_MS])), 150 * generator.lognormal(0, 1), i) for i in range(3000)]
    _, model = fitted(events)
    assert not len(model.rules)


def test_the_activity_of_an_event_explains_its_numbers_too() -> None:
    generator = np.random.default_rng(0)
    events = []
    for i in range(4000):
        read = generator.random() < 0.4
        event = call("any", (3 if read else 5_000) * generator.lognormal(0, 0.3), i)
        events.append(event | {"activity_id": 2 if read else 1})
    schema, model = fitted(events)
    assert contexts(schema, model) == set() and len(model.rules) == 2
    right, wrong = judged(schema, model, [call("any", ms) | {"activity_id": 2} for ms in (3, 5_000)])
    assert right < 1 and wrong > 6


def test_two_attributes_explain_what_one_does_not() -> None:
    generator = np.random.default_rng(0)
    level = {"read": 10, "write": 3_000, "disk": 1, "tape": 30}
    events = []
    for i in range(4000):
        operation, store = (str(generator.choice(names)) for names in (["read", "write"], ["disk", "tape"]))
        ms = level[operation] * level[store] * generator.lognormal(0, 0.2)
        events.append(call(operation, ms, i, resource=store))
    schema, model = fitted(events)
    assert contexts(schema, model) == {"api.operation", "resource"}
    right, wrong, new = judged(
        schema, model, [call("read", ms, resource=store) for ms, store in ((300, "tape"), (10, "tape"), (300, "belt"))]
    )
    assert right < 1 and wrong > 5
    assert new < 2, "a new value of the second attribute is judged by the first alone"


def test_memory_is_bounded_for_any_number_of_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contextual_numbers, "MAX_CONTEXTS", 8)
    generator = np.random.default_rng(0)
    names = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    events = []
    for i in range(6000):
        place = int(len(names) * generator.random() ** 2)  # The first ones most often.
        events.append(call(names[place], 10 * 1.15**place * generator.lognormal(0, 0.1), i))
    schema, model = fitted(events)
    assert len(model.rules) == 1 and len(model.keys) == 8 and len(model.points) == 9
    kept = {schema.fields[model.rules[0, 2]].values[(key >> 16 & 0xFFFF) - 2] for key in model.keys.tolist()}
    counts = np.array([sum(event["api"]["operation"] == name for event in events) for name in names])
    assert kept == {names[i] for i in np.argsort(-counts, kind="stable")[:8].tolist()}
    rare = judged(schema, model, [call(names[-1], 10 * 1.15**63)])
    assert rare[0] < 6, "judged as the type is"


def test_an_event_is_judged_the_same_in_any_batch() -> None:
    schema, model = fitted(list(calls(2000)))
    sample = [*calls(200, seed=1), call("checkout", 1e9), call("search", -5.0), {"class_uid": 6003, "duration": "?"}]
    together = judged(schema, model, sample)
    alone = np.concatenate([judged(schema, model, [event]) for event in sample])
    assert np.array_equal(together, alone, equal_nan=True)
    assert np.isnan(together[-1]) and np.isfinite(together[:-1]).all()


def test_fisher_sums_are_as_rare_as_they_say() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 3, 30):
        total = generator.exponential(size=(20_000, count)).sum(1)
        evidence = contextual_numbers._fisher(total, np.full(len(total), count))
        assert np.quantile(evidence, [0.5, 0.99]) == pytest.approx([np.log(2), np.log(100)], abs=0.15)
    assert contextual_numbers._fisher(np.array([0.0, 1e9]), np.array([0, 400])).tolist()[0] == 0
    assert np.isfinite(contextual_numbers._fisher(np.array([1e9]), np.array([400]))).all()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("calls")
    path = folder / "calls.ndjson"
    path.write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in calls(4000)))
    fit([path], folder / "bundle")
    return load(folder / "bundle")


def scored_by(bundle: Bundle, events: list[Json]) -> ScoredBatch:
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
    return detector.score([Message("calls", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)])


def test_an_alert_names_the_number_what_it_is_of_and_the_usual_range(bundle: Bundle) -> None:
    batch = scored_by(bundle, [call("checkout", 4_100.0, 5000)])
    assert batch.cause.tolist() == ["record:duration"] and batch.p_value[0] < 0.003
    (why,) = Explainer(bundle, MemoryWindows(dim=bundle.dim)).explain(batch, np.array([0]))
    assert why.fields[0].of == ("checkout",) and why.fields[0].surprise > 6
    title = check(alerts(batch, [why])[0])["finding_info"]["title"]
    assert title.startswith("Unusual for checkout: high duration 4.1 s")
    low, high = (float(x) for x in why.fields[0].expected[0][0].split(" to "))
    assert 60 < low < 120 and 200 < high < 350, "of the events that vouch"
    assert "; usually " in title and title.endswith(" ms (90 %)")


def test_what_a_number_is_of_is_masked_in_an_alert_as_in_the_event(bundle: Bundle) -> None:
    from streamer.redaction import Redactor

    batch = scored_by(bundle, [call("checkout", 4_100.0, 5000)])
    why = Explainer(bundle, MemoryWindows(dim=bundle.dim)).explain(batch, np.array([0]))
    alert = alerts(batch, why, redactor=Redactor(["api.operation"]))[0]
    assert b"checkout" not in alert.value


def test_a_usual_duration_of_another_operation_is_less_likely_than_its_own(bundle: Bundle, tmp_path: Path) -> None:
    """The distances alone see it hardly: both the operation and the duration are common."""
    pairs = [(name, USUAL_MS[name], USUAL_MS[other]) for name in USUAL_MS for other in USUAL_MS if other != name]
    own = scored_by(bundle, [call(name, ms, 5000) for name, ms, _ in pairs]).p_value
    swapped = scored_by(bundle, [call(name, ms, 5000) for name, _, ms in pairs]).p_value
    assert (own > 0.03).all() and (swapped < 0.01).all()
