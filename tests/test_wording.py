"""Titles and descriptions speak of things, with numbers, units and what is usual."""

from dataclasses import replace

import pytest
from alerting import PORT, WORD, Json, alerts, check, explanation, one, scored

from streamer import wording
from streamer.explaining import FieldFinding
from streamer.finding import confidence
from streamer.much import RateFinding


def test_a_sequence_tells_what_came_after_what_and_what_was_expected_instead() -> None:
    start = WORD["time"]
    launched = {"type_uid": 100701, "process.file.name": "render"}
    steps = [{"type_uid": 300201}, {"type_uid": 600302, "api.operation": "ListOpen"}, launched]
    window = tuple((start - 60_000 * (3 - i), f"events:3:{i}:0", step, 0.3 * i) for i, step in enumerate(steps))
    instead = (({"type_uid": 100701, "process.file.name": "reconcile"}, 0.81), ({"type_uid": 300202}, 0.1), ({}, 0.9))
    finding = one(told=explanation(window=window, instead=instead), cause="sequence:order", entity="user:bob")
    who = "process winword.exe of user bob on host PC-7"
    title = f"Unusual order of events of {who}: process launch render after API call ListOpen; "
    assert finding["finding_info"]["title"] == f"{title}usually process launch reconcile (81 %)"
    assert "\nIn place of the last, usual is process launch reconcile (81 %).\n" in finding["finding_info"]["desc"]
    assert finding["start_time"] == start - 3 * 60_000
    assert len(finding["finding_info"]["related_events"]) == 4
    assert finding["unmapped"]["timeline"][2]["share"] == pytest.approx(0.6)
    silent = one(told=explanation(window=window, instead=instead), cause="sequence:silence", entity="user:bob")
    last = "nothing after process launch render, the last of 3 events in 2 min; usually process launch reconcile (81 %)"
    assert silent["finding_info"]["title"] == f"Unusual silence of {who}: {last}"


def test_what_did_not_come_is_named() -> None:
    window = (
        (WORD["time"] - 60_000, "events:3:0:0", {"type_uid": 300201}, 0.0),
        (WORD["time"], "events:3:1:0", {"type_uid": 100601}, 0.9),
    )
    instead = (({"type_uid": 100701, "process.file.name": "msiexec.exe"}, 0.99),)
    finding = one(told=explanation(window=window, instead=instead), cause="sequence:missing", entity="host:PC-7")
    told = "scheduled job activity without process launch msiexec.exe, which comes shortly before in 99 %"
    assert finding["finding_info"]["title"].endswith(told)
    assert "\nShortly before the last, usual is process launch msiexec.exe (99 %).\n" in finding["finding_info"]["desc"]


def test_the_earlier_event_that_is_named_is_the_one_that_made_the_newest_odd() -> None:
    window = tuple(
        (WORD["time"] - 4 + i, f"events:3:{i}:0", {"type_uid": 300201, "dst_endpoint.hostname": f"PC-{i}"}, share)
        for i, share in enumerate((0.1, 0.5, 0.0, 0.9))
    )
    title = one(told=explanation(window=window), cause="sequence:order", entity="user:bob")["finding_info"]["title"]
    assert title.endswith(": logon to PC-3 after logon to PC-1")


def test_a_rate_is_told_with_its_number_and_what_was_usual() -> None:
    def told(cause: str, entity: str, *rates: RateFinding) -> Json:
        explained = [replace(explanation(PORT), rates=rates)]
        return check(alerts(scored([WORD], cause, entity), explained)[0])

    failures = told("rate:failures.day", "user:bob", RateFinding("failures", "day", 23.4, 3.0, own=True))
    title = "Unusually many failures of user bob: about 23 within a day, never more than 3 before"
    assert failures["finding_info"]["title"] == title
    assert failures["finding_info"]["analytic"]["uid"] == "ripcurrent-rate"
    first = failures["anomaly_analyses"][0]["anomalies"][0]
    assert (first["observation_parameter"], first["observations"]) == ("failures.day", [{"value": "23"}])
    sent = told("rate:bytes.hour", "host:PC-7", RateFinding("bytes", "hour", 41_200_000.0, 0.0, own=False))
    much = "Unusually much data of host PC-7: about 41.2 MB sent within two hours, others like it seldom have any"
    assert sent["finding_info"]["title"] == much
    events, failed = (
        RateFinding("events", "hour", 255.0, 26.5, own=True),
        RateFinding("failures", "day", 40, 3, own=True),
    )
    spray = told("rate:events.hour", "address:192.0.2.1", events, failed)["finding_info"]
    assert spray["title"].endswith(
        "about 255 within two hours, never more than 26 before; also 40 failures within a day (never more than 3)"
    )
    assert "- about 40 failures within a day; never more than 3 before.\n" in spray["desc"]


def test_the_nearest_normal_event_and_what_differs() -> None:
    neighbour = {"dst_endpoint.port": "443", "actor.process.name": "winword.exe", "metadata.uid": "other"}
    desc = one(told=explanation(PORT, neighbours=(neighbour,)))["finding_info"]["desc"]
    assert "The nearest normal event differs in destination port (4444 here, 443 there)." in desc


TITLES = [
    (FieldFinding("status_id", "2", (("1", 0.99),), 5), 3002, "Unusual outcome failure in logon of"),
    (
        FieldFinding("type_uid", "100702", (("100701", 0.97),), 5),
        1007,
        "Unusual kind of event process activity: terminate of process",
    ),
    (
        FieldFinding("traffic.bytes_out", "43133000", (), 5),
        4001,
        "Unusual bytes sent 43.1 MB in network activity of",
    ),
    (FieldFinding("unmapped.serror_rate", "1", (), 5), 4001, "Unusual serror rate 1 in network activity"),
    (
        FieldFinding("actor.user.name", "", (("bob", 0.7),), 5),
        6003,
        "No user in API activity of process winword.exe on",
    ),
    (
        FieldFinding("actor.process.name", "evil.exe", (), 5),
        1007,
        "Unusual acting process evil.exe in process activity",
    ),
    (
        FieldFinding("actor.process.cmd_line", "x" * 500, (), 5),
        1007,
        f"Unusual command line of the acting process {'x' * 53}…",
    ),
    (FieldFinding("activity_id", "4", (("2", 0.8),), 5), 6003, "Unusual activity delete in API activity"),
]


@pytest.mark.parametrize(("field", "class_uid", "begins"), TITLES)
def test_titles_speak_of_things_not_of_paths(field: FieldFinding, class_uid: int, begins: str) -> None:
    title = one({**WORD, "class_uid": class_uid}, explanation(field), cause=f"record:{field.path}")["finding_info"][
        "title"
    ]
    assert title.startswith(begins)
    assert len(title) < 320


ODD = "rundll32.exe does not usually do this: unusual destination port 4444 in network activity of process winword.exe"
LAUNCH: Json = {"class_uid": 1007, "activity_id": 1, "process": {"name": "cmd.exe"}}
DOINGS = [
    (FieldFinding("actor.process.name", "winword.exe", (), 5), LAUNCH, "launch of cmd.exe by user bob on host PC-7"),
    (FieldFinding("process.name", "cmd.exe", (), 5), LAUNCH, "process activity of process winword.exe"),
    (
        FieldFinding("src_endpoint.ip", "10.0.0.5", (), 5),
        {"class_uid": 6003, "activity_id": 1, "api": {"operation": "CreateUser"}},
        "API call CreateUser of process",
    ),
    (
        FieldFinding("src_endpoint.ip", "10.0.0.5", (), 5),
        {"class_uid": 3002, "status_id": 2},
        "failed logon of process",
    ),
]


@pytest.mark.parametrize(("field", "event", "told"), DOINGS)
def test_titles_say_what_was_done(field: FieldFinding, event: Json, told: str) -> None:
    title = one({**WORD, **event}, explanation(field), cause=f"record:{field.path}")["finding_info"]["title"]
    assert f" in {told}" in title


MORE_TITLES = [
    (FieldFinding("dst_endpoint.port", "4444", (), 7, given="rundll32.exe"), ODD),
    (
        FieldFinding("actor.process.name", "winword.exe", (), 7, new=True),
        "Never seen before: acting process winword.exe in network activity of user bob on host PC-7",
    ),
    (
        FieldFinding("traffic.bytes_out", "559000", (("304 to 24700", 0.9),), 6),
        "Unusually high bytes sent 559 kB in network activity of process winword.exe of user bob on host PC-7; "
        "usually 304 to 24.7 kB (90 %)",
    ),
    (
        FieldFinding("unmapped.same_srv_rate", "0.05", (("0.99 to 1", 0.9),), 6),
        "Unusually low same service rate 0.05 in network activity of process winword.exe of user bob on host PC-7; "
        "usually 0.99 to 1 (90 %)",
    ),
    (FieldFinding("actor.session.is_mfa", "false", (), 6), "Unusual use of a second factor: no in network activity"),
]


@pytest.mark.parametrize(("field", "begins"), MORE_TITLES)
def test_titles_say_whether_it_is_new_high_low_or_odd_for_whom(field: FieldFinding, begins: str) -> None:
    assert one(told=explanation(field), cause=f"record:{field.path}")["finding_info"]["title"].startswith(begins)


def test_numbers_have_units_and_names_stay_as_they_are() -> None:
    assert wording.value("traffic.bytes", "43133000", {}) == "43.1 MB"
    assert wording.value("traffic.bytes", "over 4200", {}) == "over 4.2 kB"
    assert wording.value("duration", "388", {}) == "388 ms"
    assert wording.value("dst_endpoint.port", "44444", {}) == "44444"
    assert wording.value("process.pid", "12345", {}) == "12345"
    assert wording.value("unmapped.rate", "0.333333", {}) == "0.333"
    assert wording.value("privileges", '["SeDebug","SeLoad"]', {}) == "SeDebug, SeLoad"
    told = {"type_uid": 300201, "status_id": 2, "dst_endpoint.hostname": "WS-7"}
    assert wording.told(told) == "failed logon to WS-7"
    assert wording.told({"type_uid": 400101, "dst_endpoint.ip": "192.0.2.1", "dst_endpoint.port": 443}) == (
        "connection to 192.0.2.1 port 443"
    )
    launch = {"type_uid": 100701, "process.cmd_line": "/bin/render --pdf", "process.file.name": "render"}
    assert wording.told({**launch, "device.hostname": "app01"}) == "process launch /bin/render --pdf"
    assert wording.told({"type_uid": 100899, "metadata.event_code": "E5"}) == "log event E5"
    assert wording.told({"type_uid": 100199, "file.path": "/x"}) == "file activity /x"
    assert wording.told({}) == "event"


def test_two_usual_values_are_named_and_rare_ones_are_not() -> None:
    def usual(*expected: tuple[str, float]) -> str:
        return wording.usually("dst_endpoint.port", "4444", expected, {})

    assert usual(("443", 0.48), ("80", 0.31), ("53", 0.1)) == "usually 443 (48 %) or 80 (31 %)"
    assert usual(("443", 0.998)) == "usually 443 (over 99 %)"
    assert usual(("4444", 0.9), ("443", 0.04)) == ""


def test_rarity_and_confidence_in_words() -> None:
    assert wording.one_in(9.0) == "1 in 8,100"
    assert wording.one_in(0.0) == "every time"
    assert wording.one_in(100.0) == "less than 1 in a billion"
    assert wording.one_in(float("nan")) == "every time"
    assert [confidence(p, 1e-4) for p in (1e-4, 5e-5, 1e-5, 0.0, 1.0)] == [0, 50, 90, 99, 0]


def test_a_place_too_soon_after_another_is_named_with_what_is_odd_about_it() -> None:
    event = {**WORD, "src_endpoint": {"ip": "203.0.113.20"}}
    finding = check(alerts(scored([event], "first:address", "user:bob"), [explanation(PORT)])[0])["finding_info"]
    assert finding["title"] == (
        "Address 203.0.113.20 within an hour of another address by process winword.exe of user bob on host PC-7"
        " (network activity): both usual, never before so close together"
    )
    assert finding["analytic"]["uid"] == "ripcurrent-first"
    assert wording.cause("first:address") == "address within an hour of others"
