"""Titles and descriptions speak of things, with numbers, units and what is usual."""

from dataclasses import replace

import pytest
from alert_samples import PORT, WORD, Json, alerts, check, explanation, one, scored

from streamer.alerting import text as wording
from streamer.alerting.finding_frame import confidence
from streamer.explain.attribution import FieldFinding
from streamer.explain.peer_comparison import PeerComparison
from streamer.explain.rates import RateFinding
from streamer.explain.stretch import StretchFinding


def test_a_sequence_tells_what_came_after_what_and_what_was_expected_instead() -> None:
    start = WORD["time"]
    launched = {"type_uid": 100701, "process.file.name": "render"}
    steps = [{"type_uid": 300201}, {"type_uid": 600302, "api.operation": "ListOpen"}, launched]
    window = tuple((start - 60_000 * (3 - i), f"events:3:{i}:0", step, 0.3 * i) for i, step in enumerate(steps))
    instead = (({"type_uid": 100701, "process.file.name": "reconcile"}, 0.81), ({"type_uid": 300202}, 0.1), ({}, 0.9))
    finding = one(why=explanation(window=window, instead=instead), cause="sequence:order", entity="user:bob")
    who = "process winword.exe of user bob on host PC-7"
    title = f"Unusual order of events of {who}: process launch render after API call ListOpen; "
    assert finding["finding_info"]["title"] == f"{title}usually process launch reconcile (81 %)"
    assert "\nIn place of the last, usual is process launch reconcile (81 %).\n" in finding["finding_info"]["desc"]
    assert finding["start_time"] == start - 3 * 60_000
    assert len(finding["finding_info"]["related_events"]) == 4
    assert finding["unmapped"]["timeline"][2]["share"] == pytest.approx(0.6)
    silent = one(why=explanation(window=window, instead=instead), cause="sequence:silence", entity="user:bob")
    last = "nothing after process launch render, the last of 3 events in 2 min; usually process launch reconcile (81 %)"
    assert silent["finding_info"]["title"] == f"Unusual silence of {who}: {last}"


def test_what_did_not_come_is_named() -> None:
    window = (
        (WORD["time"] - 60_000, "events:3:0:0", {"type_uid": 300201}, 0.0),
        (WORD["time"], "events:3:1:0", {"type_uid": 100601}, 0.9),
    )
    instead = (({"type_uid": 100701, "process.file.name": "msiexec.exe"}, 0.99),)
    finding = one(why=explanation(window=window, instead=instead), cause="sequence:missing", entity="host:PC-7")
    who = "process winword.exe of user bob on host PC-7"
    title = f"Missing step before scheduled job activity by {who}: "
    came = "no process launch msiexec.exe, which comes shortly before in 99 % of cases"
    assert finding["finding_info"]["title"] == title + came
    assert "\nShortly before the last, usual is process launch msiexec.exe (99 %).\n" in finding["finding_info"]["desc"]
    alone = one(why=explanation(), cause="sequence:missing", entity="host:PC-7")["finding_info"]["title"]
    action = "connection to 203.0.113.9 port 4444"
    assert alone == f"Missing step before {action} by {who}: what usually comes shortly before did not"


def test_the_earlier_event_that_is_named_is_the_one_that_made_the_newest_odd() -> None:
    window = tuple(
        (WORD["time"] - 4 + i, f"events:3:{i}:0", {"type_uid": 300201, "dst_endpoint.hostname": f"PC-{i}"}, share)
        for i, share in enumerate((0.1, 0.5, 0.0, 0.9))
    )
    title = one(why=explanation(window=window), cause="sequence:order", entity="user:bob")["finding_info"]["title"]
    assert title.endswith(": logon to PC-3 after logon to PC-1")


def test_a_rate_is_told_with_its_number_and_what_was_usual() -> None:
    def alert(cause: str, entity: str, *rates: RateFinding) -> Json:
        explained = [replace(explanation(PORT), rates=rates)]
        return check(alerts(scored([WORD], cause, entity), explained)[0])

    failures = alert("rate:failures.day", "user:bob", RateFinding("failures", "day", 23.4, 3.0, own=True))
    title = "Unusually many failures of user bob: about 23 within a day, never more than 3 before"
    assert failures["finding_info"]["title"] == title
    assert failures["finding_info"]["analytic"]["uid"] == "ripcurrent-rate"
    first = failures["anomaly_analyses"][0]["anomalies"][0]
    assert (first["observation_parameter"], first["observations"]) == ("failures.day", [{"value": "23"}])
    sent = alert("rate:bytes.hour", "host:PC-7", RateFinding("bytes", "hour", 41_200_000.0, 0.0, own=False))
    data = "Unusually much data of host PC-7: about 41.2 MB sent within two hours, others like it seldom have any"
    assert sent["finding_info"]["title"] == data
    events, failed = (
        RateFinding("events", "hour", 255.0, 26.5, own=True),
        RateFinding("failures", "day", 40, 3, own=True),
    )
    spray = alert("rate:events.hour", "address:192.0.2.1", events, failed)["finding_info"]
    assert spray["title"].endswith(
        "about 255 within two hours, never more than 26 before; also 40 failures within a day (never more than 3)"
    )
    assert "- about 40 failures within a day; never more than 3 before.\n" in spray["desc"]


def test_the_nearest_normal_event_and_what_differs() -> None:
    neighbour = {"dst_endpoint.port": "443", "actor.process.name": "winword.exe", "metadata.uid": "other"}
    desc = one(why=explanation(PORT, neighbours=(neighbour,)))["finding_info"]["desc"]
    assert "The nearest normal event differs in destination port (4444 here, 443 there)." in desc


def test_a_stretch_is_told_by_the_steps_that_differ_from_the_nearest_normal_one() -> None:
    steps = (({"type_uid": 100104}, 20, 1), ({}, 3, 0), ({"type_uid": 300201}, 0, 9))
    stretch = (StretchFinding("user:bob", 32, 0.912, 0.2, ()), steps)
    finding = one(why=explanation(PORT, stretch=stretch), entity="user:bob")
    assert (
        "\nThe last 32 events of user bob are like no normal stretch: file delete 20 times (once in the nearest normal "
        "one), an event like none in training 3 times (never there), logon never (9 times there).\n"
    ) in finding["finding_info"]["desc"]
    assert finding["unmapped"]["stretch"] == {
        "entity": "user:bob",
        "events": 32,
        "distance": 0.912,
        "usual_distance": 0.2,
        "differing": [
            {"summary": "file delete", "here": 20, "nearest_normal": 1},
            {"summary": "an event like none in training", "here": 3, "nearest_normal": 0},
            {"summary": "logon", "here": 0, "nearest_normal": 9},
        ],
    }


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
    (FieldFinding("resources[].name", "eve", (), 5), 6003, "Unusual resource name eve in API activity"),
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


ODD = "Unusual for rundll32.exe: destination port 4444 in network activity of process winword.exe"
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


@pytest.mark.parametrize(("field", "event", "action"), DOINGS)
def test_titles_say_what_was_done(field: FieldFinding, event: Json, action: str) -> None:
    title = one({**WORD, **event}, explanation(field), cause=f"record:{field.path}")["finding_info"]["title"]
    assert f" in {action}" in title


MORE_TITLES = [
    (FieldFinding("dst_endpoint.port", "4444", (), 7, given="rundll32.exe"), ODD),
    (
        FieldFinding("process.cmd_line", "cmd.exe /c whoami", (), 7, given="powershell.exe", new=True),
        "Unusual for powershell.exe: command line cmd.exe /c whoami, never seen before, in network activity",
    ),
    (
        FieldFinding("traffic.bytes_out", "559000", (("304 to 24700", 0.9),), 6, given="rundll32.exe"),
        "Unusual for rundll32.exe: high bytes sent 559 kB in network activity",
    ),
    (
        FieldFinding("user.name", "", (("bob", 0.9),), 6, given="rundll32.exe"),
        "Unusual for rundll32.exe: no target user in",
    ),
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
    assert one(why=explanation(field), cause=f"record:{field.path}")["finding_info"]["title"].startswith(begins)


def test_numbers_have_units_and_names_stay_as_they_are() -> None:
    assert wording.value("traffic.bytes", "43133000", {}) == "43.1 MB"
    assert wording.value("traffic.bytes", "over 4200", {}) == "over 4.2 kB"
    assert wording.value("duration", "388", {}) == "388 ms"
    assert wording.value("dst_endpoint.port", "44444", {}) == "44444"
    assert wording.value("process.pid", "12345", {}) == "12345"
    assert wording.value("unmapped.rate", "0.333333", {}) == "0.333"
    assert wording.value("privileges", '["SeDebug","SeLoad"]', {}) == "SeDebug, SeLoad"
    logon = {"type_uid": 300201, "status_id": 2, "dst_endpoint.hostname": "WS-7"}
    assert wording.summary(logon) == "failed logon to WS-7"
    assert wording.summary({"type_uid": 400101, "dst_endpoint.ip": "192.0.2.1", "dst_endpoint.port": 443}) == (
        "connection to 192.0.2.1 port 443"
    )
    closed = {"type_uid": 400102, "dst_endpoint.hostname": "db01", "dst_endpoint.port": 5432}
    assert wording.summary(closed) == "closed connection to db01 port 5432"
    assert wording.summary(closed | {"type_uid": 400104, "status_id": 2}) == "failed connection to db01 port 5432"
    lookup = {"type_uid": 400301, "dst_endpoint.ip": "192.0.2.1", "dst_endpoint.port": 53}
    assert wording.summary(lookup) == "name lookup"
    assert wording.summary(lookup | {"query.hostname": "example.org"}) == "name lookup of example.org"
    launch = {"type_uid": 100701, "process.cmd_line": "/bin/render --pdf", "process.file.name": "render"}
    assert wording.summary({**launch, "device.hostname": "app01"}) == "process launch /bin/render --pdf"
    assert wording.summary({"type_uid": 100899, "metadata.event_code": "E5"}) == "log event E5"
    assert wording.summary({"type_uid": 100199, "file.path": "/x"}) == "file activity /x"
    assert wording.summary({}) == "event"


def test_two_usual_values_are_named_and_rare_ones_are_not() -> None:
    def usual(*expected: tuple[str, float]) -> str:
        return wording.usually("dst_endpoint.port", "4444", expected, {})

    assert usual(("443", 0.48), ("80", 0.31), ("53", 0.1)) == "usually 443 (48 %) or 80 (31 %)"
    assert usual(("443", 0.998)) == "usually 443 (over 99 %)"
    assert usual(("4444", 0.9), ("443", 0.04)) == ""
    assert usual(("", 0.5), ("…", 0.3)) == "usually none (50 %) or another (30 %)"


def test_rarity_and_confidence_in_words() -> None:
    assert wording.one_in(9.0) == "1 in 8,100"
    assert wording.one_in(0.0) == "every time"
    assert wording.one_in(100.0) == "less than 1 in a billion"
    assert wording.one_in(float("nan")) == "every time"
    assert [confidence(p, 1e-4) for p in (1e-4, 5e-5, 1e-5, 0.0, 1.0)] == [0, 50, 90, 99, 0]


def test_a_place_too_soon_after_another_is_named_with_what_is_odd_about_it() -> None:
    def told(event: Json, cause: str) -> Json:
        finding: Json = check(alerts(scored([event], cause, "user:bob"), [explanation(PORT)])[0])["finding_info"]
        return finding

    logon = {**WORD, "class_uid": 3002, "activity_id": 1, "src_endpoint": {"ip": "203.0.113.20"}}
    finding = told(logon, "first:address")
    assert finding["title"] == (
        "Logon of process winword.exe of user bob on host PC-7 from address 203.0.113.20 within an hour of another"
        " address: each is usual, but never so close together"
    )
    assert finding["analytic"]["uid"] == "ripcurrent-first"
    at_host = told(logon, "first:host")["title"]
    assert at_host.startswith("Logon of process winword.exe of user bob on host PC-7 within an hour of another host:")
    nameless = told({**logon, "service": None}, "first:service")["title"]
    assert " at a usual service within an hour of another service:" in nameless
    assert wording.cause("first:address") == "address within an hour of others"


def test_what_is_known_of_others_is_one_sentence() -> None:
    def known(n: int, *names: str, itself: bool = False, at_least: bool = False, kind: str = "user") -> str:
        return wording.peers_sentence("port 22", kind, n, 65, names, itself=itself, at_least=at_least)

    assert known(1, "anna") == "1 of 65 other users is known from training with port 22 (anna); this one is not."
    three = "3 of 65 other users are known from training with port 22 (anna, ben and eve); so is this one."
    assert known(3, "anna", "ben", "eve", itself=True) == three
    many = "At least 9 of 65 other hosts are known from training with port 22 (a, b, c and 6 more); this one is not."
    assert known(9, "a", "b", "c", "d", kind="host", at_least=True) == many
    masked = "9 of 65 other addresses are known from training with port 22; this one is not."
    assert known(9, kind="address") == masked
    assert known(0, itself=True) == "None of 65 other users is known from training with port 22; this one is."


def test_how_many_others_is_told_of_counts_and_changes() -> None:
    rate = RateFinding("failures", "day", 23.4, 3.0, own=True, reached=3, among=211)
    peers = PeerComparison("count", "failures.day", "user", 3, 211)
    why = replace(explanation(PORT, peers=peers), rates=(rate, replace(rate, count="events", reached=0)))
    finding = check(alerts(scored([WORD], "rate:failures.day", "user:bob"), [why])[0])
    desc = finding["finding_info"]["desc"]
    assert "never more than 3 before; reached in training by 3 of 211 other users.\n" in desc
    assert "events within a day; never more than 3 before; reached in training by none of 211 other users.\n" in desc
    assert finding["unmapped"]["peers"]["count"] == 3
    change = explanation(PORT, peers=PeerComparison("change", "address", "user", 40, 57))
    finding = check(alerts(scored([WORD], "first:address", "user:bob"), [change])[0])["finding_info"]
    went = "\nIn training 40 of 57 other users went from one usual address to another within an hour.\n"
    assert went in finding["desc"]
    contacts = replace(explanation(PORT), rates=(replace(rate, count="partners", among=0),))
    finding = check(alerts(scored([WORD], "rate:partners.day", "user:bob"), [contacts])[0])["finding_info"]
    assert finding["title"].startswith("Unusually many contacts of user bob: about 23 different ones within a day, ")
    assert "reached in training" not in finding["desc"], "of an older bundle it is not known"
