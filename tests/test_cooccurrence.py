"""Who is at two places at once: both usual, never within an hour; who does both all day is not; nor is a stranger."""

import numpy as np
from numpy.typing import NDArray

from encoder.ocsf.entities import KINDS
from state.cooccurrence import LEAST, SPAN_MS, Cooccurrence, CooccurrenceCounts, near
from state.memory.windows import MemoryWindows
from state.rolling_counts import HOUR_MS, PARTNERS
from state.windows import WindowEntries, Windows
from streamer.detection.cooccurrence_score import CAUSES, CHANCE, CooccurrenceScorer

ADDRESS = 1
HERE, THERE, PHONE = 10, 20, 30
DAY = 24 * HOUR_MS
Visit = tuple[str, int, int]
"""(user, event time, place of the address; -1: none)"""


class Named:
    """What entries add: a partner each, and nothing to count."""

    def __init__(self, places: list[int]) -> None:
        self.counted, self.failed = np.zeros(len(places), bool), np.zeros(len(places), bool)
        self.amount = np.zeros(len(places), np.int64)
        self.partners = np.full((len(places), PARTNERS), -1, np.int16)
        self.partners[:, ADDRESS] = places


def windows_at(visits: list[Visit]) -> Windows:
    m = len(visits)
    store = MemoryWindows(dim=2)
    entries = WindowEntries(
        [user for user, _, _ in visits],
        np.array([time for _, time, _ in visits], np.int64),
        np.zeros((m, 2), np.float16),
        (("events", 0),),
        np.zeros(m, np.int32),
        np.arange(m, dtype=np.int64),
        np.zeros(m, np.int32),
        Named([place for _, _, place in visits]),
    )
    return store.append(entries)


def weeks() -> list[Visit]:
    """Ann works here on even days and there on odd ones; Ben is at both all the time."""
    visits: list[Visit] = []
    for day in range(20):
        for step in range(12):
            time = day * DAY + 9 * HOUR_MS + step * HOUR_MS // 4
            visits.append(("user:ann", time, (HERE, THERE)[day % 2] if step % 4 else PHONE))
            visits.append(("user:ben", time, (HERE, THERE)[step % 2]))
    return visits


def learn(visits: list[Visit], *cuts: int) -> Cooccurrence:
    counts = CooccurrenceCounts()
    mine, before = near(windows_at(visits))
    names = [user for user, _, _ in visits]
    for start, end in zip((0, *cuts), (*cuts, len(visits)), strict=True):
        counts.add(names[start:end], mine[start:end], before[start:end])
    return counts.finish()


def surprise(cooccurrence: Cooccurrence, visits: list[Visit]) -> NDArray[np.float64]:
    """Of the last of these visits."""
    mine, before = near(windows_at(visits))
    nats: NDArray[np.float64] = cooccurrence.surprise([visits[-1][0]], mine[-1:], before[-1:])[0]
    return nats


def test_a_flip_within_the_hour_between_places_that_were_days_apart_is_odd() -> None:
    learned = learn(weeks())
    flip = [("user:ann", 30 * DAY, HERE), ("user:ann", 30 * DAY + 60_000, -1), ("user:ann", 30 * DAY + SPAN_MS, THERE)]
    nats = surprise(learned, flip)
    # Nine of twelve visits a day are no phone's, on ten days each: so many meetings were to be expected by chance.
    assert nats[ADDRESS] > np.log(20)
    assert nats[np.arange(PARTNERS) != ADDRESS].tolist() == [0.0] * (PARTNERS - 1)
    assert surprise(learned, [flip[-1], ("user:ann", 31 * DAY, HERE)])[ADDRESS] == 0.0  # a day later
    late = [*flip[:2], ("user:ann", 30 * DAY + SPAN_MS + 1, THERE)]
    assert surprise(learned, late)[ADDRESS] == 0.0


def test_places_that_come_together_at_other_times_too_are_not_odd() -> None:
    learned = learn(weeks())
    for user, first, second in (("user:ben", HERE, THERE), ("user:ann", PHONE, HERE), ("user:ann", THERE, PHONE)):
        assert surprise(learned, [(user, 30 * DAY, first), (user, 30 * DAY + 60_000, second)])[ADDRESS] < CHANCE


def test_nothing_is_said_of_strangers_and_of_places_that_are_not_well_known() -> None:
    seldom = [("user:ann", (21 + i) * DAY, 40) for i in range(LEAST - 1)]
    learned = learn([*weeks(), *seldom])
    assert not surprise(learned, [("user:eve", 30 * DAY, HERE), ("user:eve", 30 * DAY + 1, THERE)]).any()
    for place in (40, 41):
        assert not surprise(learned, [("user:ann", 30 * DAY, HERE), ("user:ann", 30 * DAY + 1, place)]).any()
    assert not surprise(CooccurrenceCounts().finish(), [("user:ann", 1, HERE), ("user:ann", 2, THERE)]).any()


def test_how_many_others_change_within_the_hour_is_counted() -> None:
    learned = learn(weeks())
    assert learned.changing("user:cleo", ADDRESS) == (2, 2), "Ann goes to her phone and back, Ben to both"
    assert learned.changing("user:ben", ADDRESS) == (1, 1)
    assert learned.changing("user:cleo", ADDRESS + 1) == (0, 0)
    stays = [(user, time, place) for user, time, place in weeks() if user == "user:ben" or place == HERE]
    assert learn(stays).changing("user:cleo", ADDRESS) == (1, 2)
    assert learn(stays).changing("user:ben", ADDRESS) == (0, 1)


def test_counting_in_parts_is_counting_in_one() -> None:
    whole, parts = learn(weeks()), learn(weeks(), 5, 6, 300)
    for name in ("keys", "events", "pairs", "counts"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_an_event_that_is_late_or_out_of_order_meets_only_what_lies_before_it() -> None:
    visits = [("user:ann", 1000, HERE), ("user:ann", 3000, THERE), ("user:ann", 2000, PHONE)]
    mine, before = near(windows_at(visits))
    assert mine[:, ADDRESS].tolist() == [HERE, THERE, PHONE]
    assert [sorted(set(row[:, ADDRESS].tolist()) - {-1}) for row in before] == [[], [HERE], [HERE]]
    full = [("user:ann", 10_000 + i, HERE) for i in range(32)]
    mine, before = near(windows_at([*full, ("user:ann", 1, THERE)]))
    assert (mine[-1] == -1).all()


def test_a_user_who_flips_is_evidence_and_a_host_that_many_visit_is_not() -> None:
    scorer = CooccurrenceScorer(learn(weeks()))
    visits = weeks()
    mine, before = near(windows_at(visits))
    scorer.fit(scorer.model.surprise([user for user, _, _ in visits], mine, before), events=2 * len(visits))
    flip = [("user:ann", 30 * DAY, HERE), ("user:ann", 30 * DAY + 60_000, THERE)]
    kinds = np.array([KINDS.index("user")] * 2, np.int8)
    evidence, sort = scorer.judge([user for user, _, _ in flip], kinds, windows_at(flip))
    assert evidence[1] > 5 > 1 > evidence[0]
    assert CAUSES[sort[1]] == "first:address"
    hosts = np.full(2, KINDS.index("host"), np.int8)
    assert not scorer.judge([user for user, _, _ in flip], hosts, windows_at(flip))[0].any()
