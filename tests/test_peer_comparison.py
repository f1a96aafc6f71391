"""What an alert says of others is what they did in training, and nothing where training does not tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from alert_samples import Json, alerts, check
from service_process import short_training

from encoder.ocsf.entities import KINDS
from encoder.ocsf.events import Message
from state.memory.windows import MemoryWindows
from streamer.bundles import bundle_files as bundles
from streamer.detection.bundle import Bundle
from streamer.detection.detector import Detector
from streamer.explain.attribution import Explainer
from streamer.explain.peer_comparison import PeerComparison, kind_of, names_of
from streamer.redaction import Redactor
from streamer.training.fit import fit

pytestmark = pytest.mark.extended

MINUTE = 60_000
START = 1_780_000_000_000
USERS = ("anna", "ben", "carol", "dave", "oscar", "frank", "grace", "heidi")
DESK = dict(zip(USERS, ("north", "south", "east", "west", "upper", "lower", "inner", "outer"), strict=True))
AT_MAIL = ("anna", "ben", "carol", "dave", "oscar")


def logon(time: int, user: str, host: str) -> Json:
    return {
        "time": time,
        "class_uid": 3002,
        "activity_id": 1,
        "type_uid": 300201,
        "user": {"name": user},
        "device": {"hostname": host},
        "logon_type_id": 3,
        "status_id": 1,
    }


def sent(time: int, user: str, amount: int) -> Json:
    return {
        "time": time,
        "class_uid": 4001,
        "activity_id": 6,
        "type_uid": 400106,
        "actor": {"user": {"name": user}},
        "device": {"hostname": DESK[user]},
        "traffic": {"bytes_out": amount},
    }


def training() -> list[Json]:
    """Two days of eight users at their workstations: five go to mail, dave alone to vault; grace sends much, the others
    little."""
    events, time = [], START
    for turn in range(150):
        for place, user in enumerate(USERS):
            time += 2 * MINUTE
            host = "mail" if user in AT_MAIL and turn % 15 == 0 else DESK[user]
            events.append(logon(time, user, "vault" if user == "dave" and turn % 15 == 1 else host))
            if turn % 2:
                events.append(sent(time + 1, user, (50_000 if user == "grace" else 500) + 7 * turn + place))
    return events


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("others")
    (folder / "train.ndjson").write_bytes(b"\n".join(map(orjson.dumps, training())))
    with short_training():
        fit([folder / "train.ndjson"], folder / "bundle", redact=["session.uid"])
    return bundles.load(folder / "bundle")


def explained(bundle: Bundle, event: Json, cause: str, entity: str) -> tuple[PeerComparison | None, Json]:
    """What is said of others, were this event an alert for this cause; and the whole alert."""
    detector = Detector(bundle, MemoryWindows(dim=bundle.dim))
    batch = detector.score([Message("events", 0, 0, -1, orjson.dumps(event))])
    batch.cause[:], batch.entity[:] = cause, entity
    (why,) = Explainer(detector.bundle, detector.windows).explain(batch, np.arange(1))
    (alert,) = alerts(batch, [why])
    return why.peers, check(alert)


LATER = START + 3 * 24 * 60 * MINUTE


def test_who_else_had_the_odd_value_is_named(fitted: Bundle) -> None:
    peers, finding = explained(fitted, logon(LATER, "heidi", "mail"), "record:device.hostname", "user:heidi")
    assert peers is not None
    assert set(peers.names) == set(AT_MAIL)
    assert (peers.what, peers.of, peers.kind) == ("value", "device.hostname", "user")
    assert (peers.count, peers.among, peers.itself) == (5, 7, False)
    sentence = "5 of 7 other users are known from training with host mail in such events ("
    assert f"\n{sentence}" in finding["finding_info"]["desc"]
    assert " and 2 more); this one is not." in finding["finding_info"]["desc"]
    assert finding["unmapped"]["peers"]["names"] == list(peers.names)


def test_one_that_does_so_itself_is_not_among_the_others(fitted: Bundle) -> None:
    peers, _ = explained(fitted, logon(LATER, "anna", "mail"), "record:device.hostname", "user:anna")
    assert peers is not None
    assert set(peers.names) == set(AT_MAIL) - {"anna"}
    assert peers.itself
    alone, finding = explained(fitted, logon(LATER, "dave", "vault"), "record:device.hostname", "user:dave")
    assert alone is not None
    assert (alone.count, alone.names, alone.itself) == (0, (), True)
    assert (
        "None of 7 other users is known from training with host vault in such events; this one is."
        in (finding["finding_info"]["desc"])
    )


def test_a_run_is_told_by_its_user(fitted: Bundle) -> None:
    event = logon(LATER, "heidi", "mail") | {"metadata": {"correlation_uid": "run-1"}}
    peers, _ = explained(fitted, event, "record:device.hostname", "correlation:run-1")
    assert peers is not None
    assert peers.kind == "user"


def test_of_a_number_those_with_as_much_are_counted(fitted: Bundle) -> None:
    peers, finding = explained(fitted, sent(LATER, "ben", 49_000), "record:traffic.bytes_out", "user:ben")
    assert peers is not None
    assert (peers.what, peers.names, peers.itself) == ("more", ("grace",), False)
    assert "with bytes sent 49 kB or more in such events (grace); this one is not." in finding["finding_info"]["desc"]


def test_where_the_examples_show_nobody_nothing_is_said(fitted: Bundle) -> None:
    peers, finding = explained(fitted, sent(LATER, "ben", 10**9), "record:traffic.bytes_out", "user:ben")
    assert peers is None
    assert "peers" not in finding["unmapped"]
    assert " known from training " not in finding["finding_info"]["desc"]


def test_a_value_that_is_new_was_nobodys(fitted: Bundle) -> None:
    peers, finding = explained(fitted, logon(LATER, "ben", "attic"), "record:device.hostname", "user:ben")
    assert peers == PeerComparison("value", "device.hostname", "user", 0, 7)
    assert "host (device.hostname): attic; " in finding["finding_info"]["desc"]
    assert "never seen in training." in finding["finding_info"]["desc"]
    assert " known from training " not in finding["finding_info"]["desc"], "that is said already"


def test_of_a_course_of_events_who_has_such_events_is_told(fitted: Bundle) -> None:
    peers, finding = explained(fitted, logon(LATER, "dave", "vault"), "sequence:order", "user:dave")
    assert peers is not None
    assert (peers.what, peers.kind, peers.itself) == ("event", "user", True)
    silent, _ = explained(fitted, logon(LATER, "dave", "vault"), "sequence:silence", "user:dave")
    assert silent is None
    assert "events like it" in finding["finding_info"]["desc"]


def test_names_of_others_are_masked_where_their_attribute_is_listed(fitted: Bundle) -> None:
    detector = Detector(fitted, MemoryWindows(dim=fitted.dim))
    batch = detector.score([Message("events", 0, 0, -1, orjson.dumps(logon(LATER, "heidi", "mail")))])
    batch.cause[:], batch.entity[:] = "record:device.hostname", "user:heidi"
    why = Explainer(detector.bundle, detector.windows).explain(batch, np.arange(1))
    for listed in (["user.name", "actor.user.name"], ["user", "actor"]):
        (alert,) = alerts(batch, why, redactor=Redactor(listed))
        peers = check(alert)["unmapped"]["peers"]
        assert (peers["count"], peers["names"]) == (5, [])
        assert not [user for user in USERS if user.encode() in alert.value]


def test_features_of_masked_attributes_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "train.ndjson").write_bytes(b"\n".join(map(orjson.dumps, training()[:400])))
    with short_training():
        bundle = fit([tmp_path / "train.ndjson"], tmp_path / "bundle", redact=["user.name"]).bundle
    fields = [field.name for field in bundle.encoder.schema.fields]
    assert not bundle.codes[fields.index("user.name")].any()
    assert bundle.codes[fields.index("device.hostname")].any()
    peers, _ = explained(bundle, logon(LATER, "heidi", "mail"), "record:device.hostname", "user:heidi")
    assert peers is None


def test_examples_name_the_entities_that_their_events_did() -> None:
    examples: Sequence[dict[str, Any]] = (
        {"type_uid": 300201, "user.name": "LAB\\Anna", "device.hostname": "PC-1", "actor.user.name": "x"},
        {"type_uid": 100701, "actor.user.name": "root", "user.name": "Ben", "device.hostname": "PC-2"},
        {"type_uid": 400106, "src_endpoint.ip": "::ffff:10.0.0.1", "device.hostname": "-"},
    )
    assert names_of(examples) == [
        {"user": "user:anna", "host": "host:pc-1"},
        {"user": "user:root@pc-2", "host": "host:pc-2"},
        {"address": "address:10.0.0.1"},
    ]
    assert names_of([]) == []


def test_whose_others_are_told() -> None:
    names = {kind: f"{kind}:x" for kind in KINDS}
    assert kind_of("host:x", names) == "host"
    assert kind_of("correlation:x", names) == "user"
    assert kind_of("user:x", names, "actor.user.name") == "host"
    assert kind_of("process:x", {"process": "process:x"}) == ""
    assert kind_of("", {"service": "service:x"}) == "service"
