"""The detector: scores do not depend on batches, silence is evidence, explanations say what mattered; a bundle that is
not what it was is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray
from p_values import assert_same_p_values

import encoder.training.replaced_fields
import encoder.training.sequence
from encoder.ocsf.decoder import decode
from encoder.ocsf.entities import entities
from encoder.ocsf.events import Message
from state.memory.timers import MemoryTimers
from state.memory.windows import MemoryWindows
from streamer.alerting.file_thresholds import daily_threshold
from streamer.bundles import bundle_files as bundles
from streamer.bundles.bundle_files import BundleError
from streamer.detection.batches import ScoredBatch
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector, window_entries
from streamer.detection.score_files import score_files
from streamer.devtools.simulator.generator import MONDAY, schedule, simulate, write
from streamer.explain.attribution import Explainer
from streamer.offline.file_output import write_alerts, write_scores
from streamer.redaction import MASK
from streamer.training import fit as fitting
from streamer.training.fit import FitError, fit

EVENTS_PER_DAY = 2600


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three clean days to fit on and one with incidents."""
    folder = tmp_path_factory.mktemp("days")
    made = list(simulate(seed=3, days=4, events_per_day=EVENTS_PER_DAY, incidents=schedule(4, clean=3)))
    write(made[:3], folder / "train.ndjson.gz")
    write(made[3:], folder / "test.ndjson", folder / "labels.csv")
    return folder / "train.ndjson.gz", folder / "test.ndjson"


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Short training: these tests are about what is done with a model, not about how good it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.training.replaced_fields, "STEPS", 200)
        patch.setattr(encoder.training.sequence, "STEPS", 200)
        yield


@pytest.fixture(scope="module")
def fitted(days: tuple[Path, Path], quick: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    path = tmp_path_factory.mktemp("bundles") / "b"
    return fit([days[0]], path).bundle, path


def messages(path: Path, n: int) -> list[Message]:
    with path.open("rb") as lines:
        return [Message("events", i % 2, i, 1_800_000_000_000, line) for i, line in enumerate(islice(lines, n))]


def score(bundle: Bundle, batches: Sequence[Sequence[Message]]) -> list[ScoredBatch]:
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
    return [detector.score(batch) for batch in batches]


@pytest.mark.parametrize("size", [1, 7, 256])
def test_a_score_does_not_depend_on_how_the_stream_was_cut(
    fitted: tuple[Bundle, Path], days: tuple[Path, Path], size: int
) -> None:
    stream = messages(days[1], 300)
    whole = score(fitted[0], [stream])[0]
    parts = score(fitted[0], [stream[i : i + size] for i in range(0, len(stream), size)])
    assert_same_p_values(np.concatenate([part.p_value for part in parts]), whole.p_value)
    np.testing.assert_allclose(np.concatenate([part.severity for part in parts]), whole.severity, rtol=1e-4)
    assert [c for part in parts for c in part.cause] == whole.cause.tolist()


def test_events_that_a_source_delivers_twice_change_no_score_of_others(
    fitted: tuple[Bundle, Path], days: tuple[Path, Path]
) -> None:
    rng = np.random.default_rng(0)
    n, again = 1500, np.flatnonzero(rng.random(1500) < 0.1)
    delivered = np.append(np.arange(n), again + rng.integers(1, 50, len(again)) + 0.5)
    order = np.append(np.arange(n), again)[np.argsort(delivered, kind="stable")]
    with days[1].open("rb") as file:
        lines = list(islice(file, n))
    once, twice = (
        [Message("events", 0, i, 1_800_000_000_000, lines[row]) for i, row in enumerate(rows)]
        for rows in (range(n), order.tolist())
    )
    _, first = np.unique(order, return_index=True)
    repeats = np.delete(np.arange(len(order)), first)
    straight, disturbed = score(fitted[0], [once])[0], score(fitted[0], [twice[:700], twice[700:]])
    p_value = np.concatenate([part.p_value for part in disturbed])
    cause = np.concatenate([part.cause for part in disturbed])
    assert_same_p_values(p_value[first], straight.p_value)
    assert (cause[first] == straight.cause).all()
    assert {cause.partition(":")[0] for cause in straight.cause} > {"sequence", "rate"}
    assert {cause.partition(":")[0] for cause in cause[repeats]} == {"record"}


def test_events_that_differ_in_uid_time_or_content_are_not_taken_for_repeats(fitted: tuple[Bundle, Path]) -> None:
    def event(**changed: object) -> dict[str, object]:
        return {
            "metadata": {"version": "1.5.0", "uid": "1"},
            "time": 1_768_176_001_000,
            "class_uid": 3002,
            "category_uid": 3,
            "activity_id": 1,
            "type_uid": 300201,
            "severity_id": 1,
            "user": {"name": "ann"},
            "device": {"hostname": "ws-1", "ip": "10.0.0.1"},
            "status_id": 1,
        } | changed

    def own(*events: dict[str, object]) -> list[int]:
        detector = Detector(fitted[0], MemoryWindows(dim=fitted[0].dim))
        stream = [Message("events", 0, i, 1_800_000_000_000, orjson.dumps(each)) for i, each in enumerate(events)]
        prepared = detector.prepare(stream)
        windows = detector.windows.append(prepared.entries)
        return [int(windows.own[pair]) for pair in np.flatnonzero(prepared.entities.row == len(events) - 1)]

    assert set(own(event(), event())) == {-1}
    other, none = {"version": "1.5.0", "uid": "2"}, {"version": "1.5.0"}
    assert -1 not in own(event(), event(metadata=other))
    assert -1 not in own(event(), event(time=1_768_176_002_000))
    assert -1 not in own(event(), event(activity_id=2, type_uid=300202))
    assert -1 not in own(event(metadata=none), event(metadata=none))


def test_a_loaded_bundle_scores_as_the_one_that_was_saved(fitted: tuple[Bundle, Path], days: tuple[Path, Path]) -> None:
    stream = messages(days[1], 500)
    again = bundles.load(fitted[1])
    assert again.version == fitted[0].version
    np.testing.assert_array_equal(score(again, [stream])[0].p_value, score(fitted[0], [stream])[0].p_value)


@pytest.mark.extended
def test_the_same_seed_gives_the_same_bundle(
    fitted: tuple[Bundle, Path], days: tuple[Path, Path], tmp_path: Path
) -> None:
    again = fit([days[0]], tmp_path / "b").bundle
    assert again.manifest["files"] == fitted[0].manifest["files"]


def test_what_is_normal_is_seldom_unusual_and_p_values_are_uniform_enough(
    fitted: tuple[Bundle, Path], tmp_path: Path
) -> None:
    """On a clean day that was not fitted on. A wide band: one small day, a short training."""
    write(list(simulate(seed=3, days=4, events_per_day=EVENTS_PER_DAY))[3:], tmp_path / "clean.ndjson")
    p = score_files([tmp_path / "clean.ndjson"], fitted[0]).p_value
    for level in (0.1, 0.01):
        assert level / 4 < (p <= level).mean() < level * 4


def test_garbage_is_rejected_alone_and_the_rest_scores_the_same(
    fitted: tuple[Bundle, Path], days: tuple[Path, Path]
) -> None:
    stream = messages(days[1], 60)
    bad = [Message("garbage", 0, i, 0, value) for i, value in enumerate([b"{", b"[]", b"", None, b"null", b"\xff\x00"])]
    mixed = score(fitted[0], [[*stream[:30], *bad, *stream[30:]]])[0]
    assert len(mixed.rejects) == len(bad)
    assert_same_p_values(mixed.p_value, score(fitted[0], [stream])[0].p_value)


def test_nothing_can_be_scored_of_nothing(fitted: tuple[Bundle, Path]) -> None:
    empty = score(fitted[0], [[]])[0]
    assert len(empty) == 0 and empty.p_value.shape == (0,)


def test_explanations_name_what_is_odd(fitted: tuple[Bundle, Path], days: tuple[Path, Path]) -> None:
    launches = [m for m in messages(days[1], 5000) if b'"type_uid":100701' in (m.value or b"").replace(b" ", b"")]
    event = orjson.loads(launches[0].value or b"")
    event["process"]["name"] = event["process"]["file"]["name"] = "mimikatz.exe"
    event["process"]["file"]["path"] = "C:\\Temp\\mimikatz.exe"
    detector = Detector(fitted[0], MemoryWindows(dim=fitted[0].dim))
    scored = detector.score([Message("t", 0, 0, 1_800_000_000_000, orjson.dumps(event))])
    explanation = Explainer(detector.bundle, detector.windows).explain(scored, np.array([0]))[0]
    assert any("mimikatz" in finding.observed for finding in explanation.fields[:3])
    assert explanation.neighbours and explanation.distance > 0
    assert scored.p_value[0] < np.median(score(fitted[0], [launches])[0].p_value)


def test_a_sequence_is_explained_by_its_window_as_it_was(fitted: tuple[Bundle, Path], days: tuple[Path, Path]) -> None:
    """Of a busy entity it has moved on by the end of a large batch."""
    (scored,) = score(fitted[0], [messages(days[1], 3000)])
    rows = np.flatnonzero(np.isin(scored.cause, ("sequence:order", "sequence:missing")))
    nothing = MemoryWindows(dim=fitted[0].dim)
    explanations = Explainer(fitted[0], nothing).explain(scored, rows)
    assert len(rows) > 5
    for row, why in zip(rows.tolist(), explanations, strict=True):
        assert scored.coordinates.label(row) in [where for _, where, _, _ in why.window]


InactiveEvents = list[tuple[int, str, int, str, float]]
"""(offset at which a silence was clear, entity, offset of its last event, type of that, p-value)"""


@pytest.fixture
def restless(fitted: tuple[Bundle, Path]) -> Iterator[Bundle]:
    """The bundle, whatever the short training found, with kinds of entity that end after half a minute."""
    sequences = fitted[0].scorer.sequences
    assert sequences is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences.model, "timeouts", {"user": 30_000, "correlation": 30_000})
        yield fitted[0]


def inactive(bundle: Bundle, batches: Sequence[Sequence[Message]], timers: MemoryTimers) -> InactiveEvents:
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim), timers=timers)
    seen: InactiveEvents = []
    for batch in batches:
        scored = detector.score(batch)
        last = scored.inactive
        if last is not None and last.noticed_at is not None:
            at, of = scored.coordinates.offset[last.noticed_at].tolist(), last.coordinates.offset.tolist()
            types = [str(record["type_uid"]) for record in last.records]
            seen += zip(at, last.entity.tolist(), of, types, last.p_value.tolist(), strict=True)
    return seen


@pytest.mark.parametrize("size", [1, 7, 256])
def test_who_fell_silent_and_where_does_not_depend_on_how_the_stream_was_cut(
    restless: Bundle, days: tuple[Path, Path], size: int
) -> None:
    stream = [message._replace(partition=0) for message in messages(days[1], 400)]
    whole = inactive(restless, [stream], MemoryTimers())
    cut = inactive(restless, [stream[i : i + size] for i in range(0, len(stream), size)], MemoryTimers())
    assert [row[:4] for row in cut] == [row[:4] for row in whole]
    assert_same_p_values([row[4] for row in cut], [row[4] for row in whole])
    times = [orjson.loads(message.value or b"")["time"] for message in stream]
    assert len({row[2] for row in whole}) > 20
    for clear, _, last, type_uid, p_value in whole:
        assert times[clear] - times[last] > 29_000 and clear > last
        assert type_uid == str(orjson.loads(stream[last].value or b"")["type_uid"])
        assert 0 < p_value <= 1


def test_at_the_end_of_a_stream_all_who_are_waited_for_are_silent_once(
    restless: Bundle, days: tuple[Path, Path]
) -> None:
    detector = Detector(restless, MemoryWindows(dim=restless.dim), timers=MemoryTimers())
    scored = detector.score(messages(days[1], 200))
    left = detector.finish()
    assert left is not None and len(set(left.entity)) == len(left)
    assert set(left.cause) == {"sequence:silence"} and left.time.max() > scored.time.max() - 30_000
    assert detector.finish() is None


def test_the_silence_of_a_file_is_told_where_its_entity_was_last(
    fitted: tuple[Bundle, Path], days: tuple[Path, Path], tmp_path: Path
) -> None:
    scores = score_files([days[1]], fitted[0])
    entities = [str(entity) for entity in scores.entity]
    quiet = next(name for name in entities if name.startswith("user:") and entities.count(name) > 3)
    last = len(entities) - 1 - entities[::-1].index(quiet)
    scores.p_value[last], scores.cause[last] = 1e-12, "sequence:silence"
    lines = np.where(np.arange(len(scores)) == last, 1e-6, 0.0)
    assert write_alerts([days[1]], fitted[0], scores, lines, tmp_path / "alerts.ndjson") == 1
    finding = orjson.loads((tmp_path / "alerts.ndjson").read_bytes().splitlines()[0])
    assert finding["unmapped"]["cause"] == "sequence:silence"
    assert finding["unmapped"]["entity"] == quiet
    assert finding["unmapped"]["source"]["offset"] == last
    title = finding["finding_info"]["title"]
    assert title.startswith("Unusual silence of ") and "user " in title and ": nothing after " in title


@pytest.mark.parametrize(
    "name", ["schema.json", "encoder.safetensors", "scores.safetensors", "baseline.hnsw", "exemplars.ndjson"]
)
def test_a_bundle_that_was_changed_is_refused_by_the_name_of_the_file(
    fitted: tuple[Bundle, Path], tmp_path: Path, name: str
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(fitted[1], copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        bundles.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        bundles.load(copy)


def test_a_bundle_that_is_not_there_or_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        bundles.load(tmp_path / "nowhere")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_bytes(b'{"format": 0}')
    with pytest.raises(BundleError, match="format"):
        bundles.load(tmp_path / "old")


def test_a_folder_that_is_no_bundle_is_not_replaced(days: tuple[Path, Path], quick: None, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(BundleError, match="not a bundle"):
        fit([days[0]], tmp_path / "mine")
    assert (tmp_path / "mine" / "precious").read_text() == "x"


def test_exemplars_hold_listed_attributes_masked(days: tuple[Path, Path], quick: None, tmp_path: Path) -> None:
    bundle = fit([days[0]], tmp_path / "b", redact=["process.cmd_line"]).bundle
    for examples in (bundle.exemplars, bundle.anonymised):
        lines = {orjson.loads(each).get("process.cmd_line") for each in examples}
        assert lines == {None, MASK}


def test_too_few_events_to_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "few.ndjson").write_bytes(b'{"class_uid": 1}\n' * 3 + b"garbage\n")
    with pytest.raises(FitError, match=r"3 events could be read; .*1 could not be"):
        fit([tmp_path / "few.ndjson"], tmp_path / "b")


def test_a_score_file_has_a_line_an_event(fitted: tuple[Bundle, Path], days: tuple[Path, Path], tmp_path: Path) -> None:
    scored = score_files([days[1]], fitted[0])
    alerts = write_scores(scored, daily_threshold(20, len(scored)), tmp_path / "out.ndjson")
    rows = [orjson.loads(line) for line in (tmp_path / "out.ndjson").read_bytes().splitlines()]
    assert len(rows) == len(scored) and sum(row["alert"] for row in rows) == alerts
    assert set(rows[0]) == {"uid", "p_value", "severity", "alert", "entity", "cause"}


def hours(n: int) -> NDArray[np.int64]:
    return MONDAY + 3_600_000 * np.arange(n)


def test_the_latest_of_working_days_and_of_weekends_calibrate() -> None:
    time = hours(14 * 24)
    held = fitting.held_out(time)
    weekend = (time - MONDAY) // (24 * 3_600_000) % 7 >= 5
    for part in (weekend, ~weekend):
        assert abs(held[part].mean() - fitting.HELD_OUT) < 0.02
        assert (np.diff(held[part].astype(int)) >= 0).all()  # the latest


def test_a_day_that_has_most_events_does_not_calibrate_whole() -> None:
    """Sources that are new, or a few clocks that are old: too little would be left to learn from."""
    time = np.sort(np.concatenate([hours(4 * 24)[::24], hours(5 * 24)[-24:].repeat(400)]))
    assert fitting.held_out(time).mean() < 0.2


@pytest.mark.parametrize(("days", "held_out"), [(7, 24), (5, 24), (4, 14)])
def test_of_five_working_days_the_latest_calibrates_with_its_night(days: int, held_out: int) -> None:
    held = fitting.held_out(hours(days * 24))
    assert held[: 5 * 24].sum() == held_out
    assert (np.diff(held[: 5 * 24].astype(int)) >= 0).all()  # the latest


def test_events_of_others_are_no_repeats_where_a_source_gives_all_the_same_uid() -> None:
    """Sixty failed logons of a spray in one second once counted as one."""
    logon = {"class_uid": 3002, "activity_id": 1, "time": MONDAY, "metadata": {"uid": "the same"}, "status_id": 2}
    records = [logon | {"user": {"name": name}, "src_endpoint": {"ip": "10.0.0.9"}} for name in ("ann", "bob", "ann")]
    events, _ = decode([Message("t", 0, i, -1, orjson.dumps(record)) for i, record in enumerate(records)])
    found = entities(events)
    prints = window_entries(events, found, np.zeros((3, 8), np.float16)).fingerprint
    assert prints is not None
    of_address = prints[[name == "address:10.0.0.9" for name in found.entity]]
    assert of_address[0] == of_address[2] != of_address[1]
