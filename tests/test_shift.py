"""Several samples mildly off in one direction are a shift of level; an entity that stands elsewhere is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import alerts, check
from numpy.typing import NDArray

from encoder.models.record_network import EMBEDDING
from encoder.ocsf.events import Message
from state.memory.windows import MemoryWindows
from state.redis.windows import RedisWindows
from state.windows import WindowEntries
from streamer.bundles.bundle_files import load
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector
from streamer.detection.shift_score import LATEST, ShiftScorer
from streamer.explain.attribution import Explainer
from streamer.training.fit import fit

START = 1_760_000_000_000
MINUTE = 60_000
LEVELS = {"cart": 50, "adverts": 500, "mail": 20, "search": 2000, "currency": 120}
NUMBERS = ("memory_mib", "cpu_millicores", "net_bytes")

Json = dict[str, Any]


def shifts(deviations: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """What is said at each event of one entity whose events have these deviations, float64 [n, numbers]."""
    n, numbers = deviations.shape
    windows = MemoryWindows(dim=EMBEDDING + numbers)
    vectors = np.concatenate([np.zeros((n, EMBEDDING)), deviations], axis=1).astype(np.float16)
    numbered = np.arange(n)
    seen = windows.append(
        WindowEntries(
            ["host:a"] * n,
            START + MINUTE * numbered,
            vectors,
            (("t", 0),),
            np.zeros(n, np.int32),
            numbered,
            np.zeros(n, np.int32),
        )
    )
    return ShiftScorer(tuple(f"n{i}" for i in range(numbers))).raw(seen)


def test_samples_off_in_one_direction_add_up_and_others_do_not() -> None:
    generator = np.random.default_rng(0)
    usual = generator.normal(0, 0.5, (40, 2))
    shifted, mixed, once = usual.copy(), usual.copy(), usual.copy()
    shifted[-LATEST:, 1] = 2.0
    mixed[-LATEST:, 1] = 2.0 * np.resize([1, -1], LATEST)
    once[-1, 1] = 2.0
    said = [shifts(each)[0][-1] for each in (shifted, mixed, once)]
    assert said[0] > 1.5 and said[0] > 1.8 * max(said[1:])
    assert shifts(shifted)[1][-1] == 1


def test_an_entity_that_stands_elsewhere_is_usual_once_its_level_is_known() -> None:
    said, _ = shifts(np.full((32, 1), 5.0))
    assert said[2] > 4 and said[-1] < 0.5
    moved = np.concatenate([np.full((30, 1), 5.0), np.full((3, 1), -1.0)])
    assert shifts(moved)[0][-1] > 5


def test_nothing_is_said_of_an_event_without_numbers() -> None:
    deviations = np.full((6, 2), np.nan)
    deviations[:3, 0] = 1.0
    deviations[4] = 3.0, np.nan
    said, strongest = shifts(deviations)
    assert np.isnan(said[[3, 5]]).all() and np.isfinite(said[[0, 1, 2, 4]]).all() and strongest[4] == 0
    assert np.isnan(shifts(np.empty((3, 0)))[0]).all()


def sample(generator: np.random.Generator, service: str, pod: str, i: int, factor: float = 1.0) -> Json:
    """The numbers of a pod once a minute, each within a tenth or so of the level of its service."""
    level = LEVELS[service] * factor
    numbers = {name: level * (n + 1) * float(generator.lognormal(0, 0.1)) for n, name in enumerate(NUMBERS)}
    return {
        "class_uid": 1008,
        "activity_id": 99,
        "time": START + i * MINUTE,
        "device": {"hostname": f"{service}-{pod}"},
        "container": {"name": service},
        "unmapped": numbers,
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pods")
    events = [sample(generator, service, "7d9f8b6c54-x2b7q", i) for i in range(700) for service in LEVELS]
    (folder / "pods.ndjson").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))
    fit([folder / "pods.ndjson"], folder / "bundle")
    return load(folder / "bundle")


def after_a_redeploy(bundle: Bundle, factors: list[float]) -> tuple[Detector, ScoredBatch]:
    """Forty usual minutes of the renamed pods, then one of them by these factors of its level."""
    generator = np.random.default_rng(7)
    events = [sample(generator, service, "5f6585d649-fnmft", 1000 + i) for i in range(40) for service in LEVELS]
    quiet = np.random.default_rng(0)
    for i, factor in enumerate(factors):
        event = sample(quiet, "cart", "5f6585d649-fnmft", 1040 + i)
        event["unmapped"] = {name: LEVELS["cart"] * (n + 1) * factor for n, name in enumerate(NUMBERS)}
        events.append(event)
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
    return detector, detector.score([Message("pods", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)])


def test_a_mild_shift_of_a_renamed_pod_is_an_alert_and_the_same_values_in_turns_are_not(bundle: Bundle) -> None:
    assert bundle.dim == EMBEDDING + len(NUMBERS)
    detector, batch = after_a_redeploy(bundle, [1.17] * 4)
    _, alternating = after_a_redeploy(bundle, [1.17, 1 / 1.17] * 2)
    assert batch.p_value[-1] < 0.003 < alternating.p_value[-4:].min()
    assert str(batch.cause[-1]).startswith("shift:unmapped.")
    assert batch.entity[-1] == "host:cart-5f6585d649-fnmft"
    row = np.array([len(batch) - 1])
    why = Explainer(bundle, detector.windows).explain(batch, row)
    finding = check(alerts(batch, why, row)[0])
    name = finding["unmapped"]["cause"].removeprefix("shift:unmapped.")
    assert finding["finding_info"]["title"].startswith("Shift of ") and "for cart" in finding["finding_info"]["title"]
    low, high = (float(x) for x in why[0].fields[0].expected[0][0].split(" to "))
    level = LEVELS["cart"] * (NUMBERS.index(name) + 1)
    assert why[0].fields[0].of == ("cart",) and 0.8 * level < low < level < high < 1.25 * level


def test_scores_do_not_depend_on_batches(bundle: Bundle) -> None:
    generator = np.random.default_rng(3)
    events = [sample(generator, service, "a", i, 1 + i / 40) for i in range(30) for service in LEVELS]
    messages = [Message("pods", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)]
    whole = Detector(bundle, MemoryWindows(dim=bundle.dim)).score(messages)
    apart = Detector(bundle, MemoryWindows(dim=bundle.dim))
    p_value = np.concatenate([apart.score(messages[i : i + 7]).p_value for i in range(0, len(messages), 7)])
    assert np.allclose(np.log(whole.p_value), np.log(p_value), atol=1e-5)


def test_windows_in_redis_give_the_same_scores(bundle: Bundle, redis_url: str, unique: Callable[[str], str]) -> None:
    """Also where a number is missing, which is no number in the window either."""
    generator = np.random.default_rng(3)
    events = [sample(generator, service, "a", i, 1 + i / 40) for i in range(40) for service in LEVELS]
    for event in events[::7]:
        del event["unmapped"]["memory_mib"]
    messages = [Message("pods", 0, i, -1, orjson.dumps(event)) for i, event in enumerate(events)]
    stored = RedisWindows(redis_url, encoder=bundle.encoder_hash, dim=bundle.dim, tenant=unique("shift"))
    stored.check_epoch({})
    p_values = [
        np.concatenate([detector.score(messages[i : i + 50]).p_value for i in range(0, len(messages), 50)])
        for detector in (Detector(bundle, stored), Detector(bundle, MemoryWindows(dim=bundle.dim)))
    ]
    assert np.allclose(np.log(p_values[0]), np.log(p_values[1]), atol=1e-5)


def test_windows_are_rebuilt_with_the_deviations(bundle: Bundle, tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    messages = [
        Message("pods", 0, i, -1, orjson.dumps(sample(generator, "cart", "a", i, 1.1 if i > 20 else 1.0)))
        for i in range(25)
    ]
    scored, remembered = (Detector(bundle, MemoryWindows(dim=bundle.dim)) for _ in range(2))
    scored.score(messages[:-1])
    remembered.remember(messages[:-1])
    p_values = [detector.score(messages[-1:]).p_value[0] for detector in (scored, remembered)]
    assert p_values[0] == p_values[1]
