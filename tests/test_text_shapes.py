"""What stands inside text is judged by its place: altered parameters and command lines are found where normalised
values cannot tell them apart, and what is new every time is no news."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from cpu_time import least_cpu_s
from numpy.typing import NDArray
from service_process import short_training
from shop_traffic import COMMANDS, REQUESTS, Event, commands, request_event, requests
from sklearn.metrics import roc_auc_score

from encoder.features.learner import SchemaLearner
from encoder.features.schema import Schema
from encoder.features.vectorizer import Vectorizer
from encoder.models import text_shapes
from encoder.models.text_shapes import TextCollector, TextFinding, TextShapes, Usual
from encoder.ocsf.decoder import decode
from encoder.ocsf.events import EventBatch, Message
from state.memory.windows import MemoryWindows
from streamer.alerting.detection_finding import _masked_part, build_alerts
from streamer.alerting.text import text_part
from streamer.bundles.bundle_files import load
from streamer.detection.detector import Detector
from streamer.detection.record_score import PARTS, TEXT
from streamer.explain.attribution import Explainer
from streamer.redaction import MASK, Redactor
from streamer.training.fit import fit

N = 3000
Make = Callable[..., list[Event]]


def decoded(events: list[Event]) -> EventBatch:
    return decode([Message("events", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)])[0]


def learnt(events: list[Event]) -> tuple[Schema, TextShapes]:
    batch, learner = decoded(events), SchemaLearner()
    learner.add(batch)
    schema = learner.finish()
    collector = TextCollector(schema)
    collector.add(batch, np.arange(len(events)))
    return schema, TextShapes.fit(collector.finish(np.arange(len(events))))


@pytest.fixture(scope="module")
def shop() -> tuple[Schema, TextShapes]:
    return learnt(requests(N, seed=1))


@pytest.fixture(scope="module")
def jobs() -> tuple[Schema, TextShapes]:
    return learnt(commands(N, seed=1))


def surprise(shapes: TextShapes, events: list[Event]) -> NDArray[np.float64]:
    return shapes(decoded(events))[0]


@pytest.mark.parametrize("family", REQUESTS)
def test_altered_requests_are_odder_than_ordinary_ones(shop: tuple[Schema, TextShapes], family: str) -> None:
    usual, altered = surprise(shop[1], requests(1500, seed=2)), surprise(shop[1], requests(500, seed=3, family=family))
    assert roc_auc_score(np.r_[np.zeros(1500), np.ones(500)], np.r_[usual, altered]) > 0.95


@pytest.mark.parametrize("family", COMMANDS)
def test_altered_command_lines_are_odder_than_ordinary_ones(jobs: tuple[Schema, TextShapes], family: str) -> None:
    usual, altered = surprise(jobs[1], commands(1500, seed=2)), surprise(jobs[1], commands(500, seed=3, family=family))
    assert roc_auc_score(np.r_[np.zeros(1500), np.ones(500)], np.r_[usual, altered]) > 0.95


def register(number: int, phone: str) -> Event:
    pairs = [("login", "abcde7"), ("mail", "abc@defg.org"), ("phone", phone), ("postcode", "12345"), ("city", "Berlin")]
    return request_event(number, "/shop/register", pairs)


def test_a_query_string_without_a_path_is_taken_apart_too() -> None:
    def without_path(events: list[Event]) -> list[Event]:
        for event in events:
            del event["http_request"]["url"]["path"]
        return events

    shapes = learnt(without_path(requests(N, seed=1)))[1]
    assert shapes.paths[0] == "http_request.url.query_string"
    usual = surprise(shapes, without_path(requests(500, seed=2)))
    altered = surprise(shapes, without_path(requests(200, seed=3, family="sql")))
    assert np.quantile(altered, 0.1) > np.quantile(usual, 0.99)


def test_what_normalised_values_cannot_tell_apart_is_told_apart(shop: tuple[Schema, TextShapes]) -> None:
    events = [register(0, "123456789"), register(1, "1" * 150)]
    features = Vectorizer(shop[0])(decoded(events))
    assert (features.codes[0] == features.codes[1]).all(), "the codes see the same event twice"
    usual, padded = surprise(shop[1], events)
    assert padded > usual + 3


def test_where_every_value_is_new_a_new_one_is_no_news(shop: tuple[Schema, TextShapes]) -> None:
    """Each phone number came once in training, and so does this."""
    usual = [register(i, str(200_000_000 + 7919 * i)) for i in range(50)]
    assert surprise(shop[1], usual).max() < 1 and surprise(shop[1], [register(0, "' OR 1=1--")])[0] > 6


def test_scores_do_not_depend_on_batches_nor_on_what_was_seen_before(shop: tuple[Schema, TextShapes]) -> None:
    events = requests(300, seed=4) + requests(100, seed=5, family="sql")
    together = surprise(shop[1], events)
    fresh = TextShapes(shop[1].attributes, shop[1].places)
    apart = np.concatenate([surprise(fresh, events[i : i + 7]) for i in range(0, len(events), 7)][::-1][::-1])
    assert (together == apart).all()


def test_training_texts_are_judged_as_live_ones(shop: tuple[Schema, TextShapes]) -> None:
    events = requests(200, seed=6) + requests(50, seed=7, family="binary")
    collector = TextCollector(shop[0])
    collector.add(decoded(events), np.arange(len(events)))
    assert (shop[1].of_texts(collector.finish(np.arange(len(events)))) == surprise(shop[1], events)).all()


def test_arrays_give_the_same_back_and_hold_no_value(shop: tuple[Schema, TextShapes]) -> None:
    arrays = shop[1].arrays()
    again = TextShapes.from_arrays(arrays)
    assert again.places == shop[1].places and again.attributes == shop[1].attributes
    assert b"abc@" not in arrays["described"].tobytes() and b"juniper" not in arrays["described"].tobytes()
    assert all((arrays[name] == other).all() for name, other in learnt(requests(N, seed=1))[1].arrays().items())


def test_memory_is_bounded_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_shapes, "MAX_ENTRIES", 2000)
    monkeypatch.setattr(text_shapes, "MAX_STRINGS", 1500)
    monkeypatch.setattr(text_shapes, "MAX_LEARNT", 20_000)
    monkeypatch.setattr(text_shapes, "CACHE_BYTES", 50_000)
    rng = random.Random(1)
    events = [request_event(i, f"/{rng.random()}/{rng.random()}", [(str(rng.random()), "x")]) for i in range(N)]
    _, shapes = learnt(events)
    held = [place for places in shapes.places for place in places.values()]
    assert sum(1 + sum(len(table) for table in place[2:6]) for place in held) <= 2000
    for start in range(0, N, 500):
        surprise(shapes, events[start : start + 500])
        assert sum(map(len, (*shapes._of_text, *shapes._of_part))) * 300 < 60_000


def test_a_distinct_text_costs_little_beside_decoding_its_event(shop: tuple[Schema, TextShapes]) -> None:
    events = requests(2000, seed=8)
    batch = decoded(events)
    messages = [Message("events", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)]
    cold = least_cpu_s(lambda: TextShapes(shop[1].attributes, shop[1].places)(batch))
    warm = least_cpu_s(lambda: shop[1](batch))
    assert cold < 3 * least_cpu_s(lambda: decode(messages))
    assert warm < 0.1 * cold


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    lines = b"".join(orjson.dumps(event) + b"\n" for event in requests(N, seed=1))
    (folder / "train.ndjson").write_bytes(lines)
    with short_training():
        fit([folder / "train.ndjson"], folder / "bundle")
    return folder / "bundle"


def test_the_alert_names_the_part_and_what_is_usual(bundle: Path) -> None:
    fitted = load(bundle)
    assert TEXT in fitted.scorer.record.calibrations and TEXT in PARTS
    detector = Detector(fitted, MemoryWindows(dim=fitted.dim))
    events = [*requests(400, seed=9), register(400, "1" * 150), register(401, "123456789")]
    scored = detector.score([Message("events", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)])
    assert scored.p_value[400] < np.quantile(scored.p_value[:400], 0.01) < scored.p_value[401]
    assert scored.cause[400] == "record:http_request.url.query_string"
    why = Explainer(fitted, detector.windows).explain(scored, np.array([400]))
    part = why[0].fields[0].part
    assert part is not None and (part.label, part.part) == ("phone", "1" * 150)
    (alert,) = build_alerts(
        scored,
        np.array([400]),
        why,
        threshold=0.01,
        bundle_version="b",
        tenant="t",
        now_ms=0,
        redactor=Redactor(),
    )
    said = orjson.loads(alert.value)
    assert "Unusual parameter phone: 1111" in said["message"] and "; usually 9 digits" in said["message"]
    assert "usually 9 digits" in said["finding_info"]["desc"]
    assert said["anomaly_analyses"][0]["anomalies"][0]["observed_pattern"].startswith("parameter phone: 1111")


@pytest.mark.parametrize(
    ("found", "name", "shown", "usual"),
    [
        (("?", "id", "1' OR 1=1", Usual("0", 0.9, 1, 6)), "parameter id", "1' OR 1=1", "usually 1 to 6 digits"),
        (("?", "id", "x", None), "parameter id", "x", "not seen in training"),
        (("?", "id", "", Usual("aA", 0.9, 1, 1)), "parameter id", "nothing", "usually 1 letter"),
        (
            ("?", "mail", "x", Usual("a@a.a", 0.9, 9, 20)),
            "parameter mail",
            "x",
            "usually 9 to 20 characters of the form a@a.a",
        ),
        (("&", "", "a&b", Usual("a&a", 1.0, 3, 3)), "set of parameters", "a, b", ""),
        (("/", "api", "..", Usual("a", 0.2, 3, 9)), "part of the path after api", "..", ""),
        ((" ", "-enc", "JAB", Usual("", 1.0, 0, 0)), "argument of -enc", "JAB", "usually nothing"),
        ((" ", "run", "x", Usual("a0", 1.0, 2, 4)), "word after run", "x", "usually 2 to 4 letters and digits"),
        ((">", "", "x", None), "first word", "x", ""),
        (("#", "", "cut", None), "length", "more than is taken apart", ""),
    ],
)
def test_a_part_in_words(found: tuple[str, str, str, Usual | None], name: str, shown: str, usual: str) -> None:
    kind, label, part, seen = found
    assert text_part(TextFinding("a.b", kind, label, part, 9.0, seen)) == (name, shown, usual)


def test_a_part_is_masked_with_its_name(shop: tuple[Schema, TextShapes]) -> None:
    event = request_event(0, "/shop/register", [("login", "a1"), ("password", "hunter2'--")])
    found = shop[1].worst(decoded([event]), 0)
    assert found is not None and found.label == "password"
    observed = Redactor().text(found.path, event["http_request"]["url"]["query_string"])
    assert MASK in observed and "hunter2" not in str(_masked_part(found, observed, Redactor()))
