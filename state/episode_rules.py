"""The book of episodes and the rules by which anomalies become stories; every store of episodes keeps one.

Promises and limits are those of `state.episodes`. Reads no clock and talks to nobody.

The rules. An episode is open until its partition's event time has passed its last event by `TIMEOUT_MS`. An anomaly
joins the first of these that is open, else it begins an episode (Create):

1. *its own*: the same cause (of rates the same count, over whatever time) and the same entity, or an entity that shares
   events with it: one of the two is named by an event of the other. Two users on one host are not one story because
   they share the host.
2. *its story*: a sequence (or rate) anomaly and a record anomaly of such entities, at most `EPISODE_MS` apart, as long
as
   the episode has fewer than `MANY_EVENTS` events: what comes in the middle of a storm is not part of it.
3. *the same elsewhere*: the same cause, type of event and value at other entities, at most `SAME_MS` apart.
4. *the crowd*: the same cause and type, whatever the value, once `MASS_EVENT` episodes of them are open that began
within
   an hour, unless its severity level is higher than that of the first of them.

Joining is told (Update) when the severity level rises, a cause is new to the episode, the events or the entities reach
2 or a power of ten, or nothing was told for `UPDATE_MS`; and is only counted otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

import orjson

from state.episodes import CLOSE, CREATE, UPDATE, Anomaly, Decision, End, Episode, Place, Position, tick
from state.errors import SourcePartition

MINUTE_MS = 60_000
TIMEOUT_MS = 60 * MINUTE_MS
EPISODE_MS = 10 * MINUTE_MS
SAME_MS = 10 * MINUTE_MS
UPDATE_MS = 30 * MINUTE_MS
MANY_EVENTS = 10
MASS_EVENT, MASS_EVENT_MS = 8, 60 * MINUTE_MS
MAX_OPEN = 4096
"""Episodes that are open at once: beyond it the one that was quiet longest is closed."""
MAX_SHARING = 32
"""Entities that share events with an episode, and others that it happened to, kept by name."""
MAX_ENTITIES = 1024
"""Entities of one episode that are told apart; more are not counted."""


@dataclass
class _Open:
    """An open episode and what is needed to go on with it. owner: source of the last event; sharing: other entities
    that its events name; type_uid, what: of its first event; members: hashes of the entities that it happened to;
    turn: higher for what changed later; told_*: as it was last told; crowd: whether all such anomalies belong to it;
    name: what it is kept under, its first event, and of a silence also whose: an event may be the last of several."""

    episode: Episode
    owner: SourcePartition
    sharing: list[str]
    type_uid: int
    what: str
    members: set[str]
    turn: int
    told_at: int
    told_count: int = 1
    told_entities: int = 1
    crowd: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or self.episode.first

    def keys(self) -> Iterator[_Key]:
        """What it is found by."""
        episode = self.episode
        for cause in episode.causes:
            for about in (_family(cause), _kind(cause)):
                yield "entity", about, episode.entity
                for name in self.sharing:
                    yield "sharing", about, name
        yield "value", episode.cause, self.type_uid, self.what
        yield "type", episode.cause, self.type_uid

    @classmethod
    def from_json(cls, text: bytes) -> _Open:
        found = orjson.loads(text)
        read = {"episode": _episode(found["episode"]), "owner": tuple(found["owner"]), "members": set(found["members"])}
        return cls(**_known(cls, found | read))


_Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Applied:
    """How far a source has been decided, and up to where that is known to be committed (offset)."""

    offset: int
    index: int
    committed: int
    number: int = 0

    @property
    def place(self) -> Place:
        return self.offset, self.index, self.number


class EpisodeRules:
    """All that is remembered, and the rules; both stores keep one. changed: names of values to be stored."""

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self._episodes: dict[str, _Open] = {}
        self._applied: dict[SourcePartition, _Applied] = {}
        self._decisions: dict[SourcePartition, list[Decision]] = {}
        self._index: dict[_Key, set[str]] = {}
        self._clocks: dict[SourcePartition, int] = {}
        """Event times as they are at the anomaly that is being decided."""
        self._turn = 0

    def __len__(self) -> int:
        return len(self._episodes)

    def decide(
        self, anomalies: Sequence[Anomaly], ends: Mapping[SourcePartition, End], position: Position
    ) -> list[Decision]:
        """As `EpisodeStore.decide`."""
        for source in ends:
            self._forget(source, position.committed.get(source, 0))
        self._clocks = dict(position.clocks)
        for anomaly in anomalies:
            tick(self._clocks, anomaly.source, max(anomaly.clock, anomaly.time))
            done = self._applied.get(anomaly.source, _NOTHING)
            at = anomaly.place
            # Before the commit nothing comes again, unless somebody wants it read again: then it is decided again.
            if done.committed <= at[0] and at <= done.place:
                continue
            self._set_applied(anomaly.source, max(at, done.place), position)
            found = self._find(anomaly)
            activity = CREATE if found is None else self._join(found, anomaly)
            found = found or self._begin(anomaly)
            if activity:
                self._record(Decision(activity, anomaly.source, at[0], at[1], found.episode, at[2]))
        if ends:
            self._close(ends)
        return [
            decision
            for source, end in ends.items()
            for decision in sorted(self._decisions.get(source, ()), key=lambda d: d.place)
            if end.first <= decision.offset <= end.last
        ]

    def _find(self, anomaly: Anomaly) -> _Open | None:
        """The open episode that it joins."""
        kind, time = _kind(anomaly.cause), anomaly.time
        for found in self._of_entities(anomaly, _family(anomaly.cause), TIMEOUT_MS):
            return found
        for found in self._of_entities(anomaly, "record" if kind == "sequence" else "sequence", EPISODE_MS):
            if found.episode.count < MANY_EVENTS and all(_kind(cause) != kind for cause in found.episode.causes):
                return found
        for found in self._at(("value", anomaly.cause, anomaly.type_uid, anomaly.what), time, SAME_MS):
            return found
        alike = self._at(("type", anomaly.cause, anomaly.type_uid), time, TIMEOUT_MS)
        alike = [found for found in alike if found.crowd or time - found.episode.first_seen <= MASS_EVENT_MS]
        if len(alike) >= MASS_EVENT or any(found.crowd for found in alike):
            crowd = min(alike, key=lambda found: (not found.crowd, found.episode.first_seen, found.episode.first))
            if anomaly.level <= crowd.episode.level:
                crowd.crowd = True
                return crowd
        return None

    def _of_entities(self, anomaly: Anomaly, about: str, quiet_ms: int) -> Iterator[_Open]:
        if anomaly.entity:
            yield from self._at(("entity", about, anomaly.entity), anomaly.time, quiet_ms)
            yield from self._at(("sharing", about, anomaly.entity), anomaly.time, quiet_ms)
            for name in anomaly.named:
                yield from self._at(("entity", about, name), anomaly.time, quiet_ms)

    def _at(self, key: _Key, time: int, quiet_ms: int) -> list[_Open]:
        """The open episodes under a key, the latest to change first."""
        names = self._index.get(key)
        if not names:
            return []
        found = (self._episodes[name] for name in names)
        still = [f for f in found if time - f.episode.last_seen <= quiet_ms and not self._is_over(f)]
        return sorted(still, key=lambda f: -f.turn)

    def _is_over(self, found: _Open) -> bool:
        """Whether the event time of its partition has passed its last event for long enough."""
        return self._clocks.get(found.owner, 0) - found.episode.last_seen > TIMEOUT_MS

    def _begin(self, anomaly: Anomaly) -> _Open:
        episode = Episode(
            first=anomaly.label,
            last=anomaly.label,
            entity=anomaly.entity,
            shown=anomaly.shown,
            cause=anomaly.cause,
            first_seen=anomaly.time,
            last_seen=anomaly.time,
            severity=anomaly.severity,
            level=anomaly.level,
            p_value=anomaly.p_value,
            causes=(anomaly.cause,),
        )
        found = _Open(
            episode,
            anomaly.source,
            [name for name in anomaly.named if name != anomaly.entity][:MAX_SHARING],
            anomaly.type_uid,
            anomaly.what,
            {_hash(anomaly.entity)},
            0,
            anomaly.time,
            name=f"{anomaly.label}|{anomaly.cause}|{anomaly.entity}" if anomaly.noticed_at else anomaly.label,
        )
        self._keep(found, moved=True)
        return found

    def _join(self, found: _Open, anomaly: Anomaly) -> int:
        """Put it into the episode; UPDATE where that is worth telling, else 0."""
        old = found.episode
        own = anomaly.entity == old.entity or anomaly.entity in found.sharing or old.entity in anomaly.named
        member, others = _hash(anomaly.entity), old.others
        if anomaly.entity and not own and member not in found.members and len(found.members) < MAX_ENTITIES:
            found.members.add(member)
            others = (*others, anomaly.shown)[:MAX_SHARING]
        new_names: list[str] = []
        if own and len(found.sharing) < MAX_SHARING:
            new_names = [n for n in (*anomaly.named, anomaly.entity) if n != old.entity and n not in found.sharing]
            found.sharing = [*found.sharing, *dict.fromkeys(new_names)][:MAX_SHARING]
        latest = anomaly.time >= old.last_seen
        new_cause = anomaly.cause not in old.causes
        found.owner = anomaly.source if latest else found.owner
        now = found.episode = replace(
            old,
            last=anomaly.label if latest else old.last,
            first_seen=min(old.first_seen, anomaly.time),
            last_seen=max(old.last_seen, anomaly.time),
            count=old.count + 1,
            entities=len(found.members),
            severity=max(old.severity, anomaly.severity),
            level=max(old.level, anomaly.level),
            p_value=min(old.p_value, anomaly.p_value),
            causes=(*old.causes, anomaly.cause) if new_cause else old.causes,
            others=others,
        )
        self._keep(found, moved=new_cause or bool(new_names))
        if not (
            new_cause
            or now.level > old.level
            or now.count >= _next(found.told_count)
            or now.entities >= _next(found.told_entities)
            or anomaly.time - found.told_at >= UPDATE_MS
        ):
            return 0
        found.told_at, found.told_count, found.told_entities = anomaly.time, now.count, now.entities
        return UPDATE

    def _close(self, ends: Mapping[SourcePartition, End]) -> None:
        """Close what has been quiet for too long by the event time of its partition, and the quietest of too many."""
        for source, end in ends.items():
            tick(self._clocks, source, end.time)
        order = sorted(self._episodes.values(), key=lambda found: (found.episode.last_seen, found.episode.first))
        too_many = len(order) - MAX_OPEN
        for found in order:
            over = found.owner in ends and self._is_over(found)
            if not over and too_many <= 0:
                continue
            too_many -= 1
            source = found.owner if found.owner in ends else next(iter(ends))
            self._record(Decision(CLOSE, source, ends[source].last, _AFTER, found.episode))
            self._drop(found)

    def _record(self, decision: Decision) -> None:
        self._decisions.setdefault(decision.source, []).append(decision)
        self.changed.add(f"d|{_name(decision.source)}")

    def _forget(self, source: SourcePartition, committed: int) -> None:
        """What was decided before the commit is published: it is not asked for again."""
        decisions, done = self._decisions.get(source, []), self._applied.get(source, _NOTHING)
        kept = [decision for decision in decisions if decision.offset >= committed]
        if len(kept) < len(decisions):
            self._decisions[source] = kept
            self.changed.add(f"d|{_name(source)}")
        if done.committed <= done.offset < committed:
            self._applied[source] = replace(done, committed=committed)
            self.changed.add(f"a|{_name(source)}")

    def _set_applied(self, source: SourcePartition, at: Place, position: Position) -> None:
        done, known = self._applied.get(source, _NOTHING), position.committed.get(source, 0)
        self._applied[source] = _Applied(at[0], at[1], max(done.committed, known), at[2])
        self.changed.add(f"a|{_name(source)}")

    def _keep(self, found: _Open, *, moved: bool) -> None:
        """Note that an episode changed; moved: also what it is found by."""
        name = found.name
        self._turn += 1
        found.turn = self._turn
        self._episodes[name] = found
        self.changed.add(f"e|{name}")
        for key in found.keys() if moved else ():
            self._index.setdefault(key, set()).add(name)

    def _drop(self, found: _Open) -> None:
        name = found.name
        del self._episodes[name]
        self.changed.add(f"e|{name}")
        for key in set(found.keys()):
            names = self._index[key]
            names.remove(name)
            if not names:
                del self._index[key]

    # As a store keeps it: names and values. The fields' names stand in it (state/redis/formats.py).

    def change_all(self) -> None:
        """All of it is to be stored."""
        self.changed.update(f"e|{name}" for name in self._episodes)
        self.changed.update(f"a|{_name(source)}" for source in self._applied)
        self.changed.update(f"d|{_name(source)}" for source in self._decisions)

    def value(self, name: str) -> bytes:
        """What stands under a name now, empty for nothing."""
        kind, _, rest = name.partition("|")
        value: Any
        if kind == "e":
            value = self._episodes.get(rest)
        else:
            value = (self._applied if kind == "a" else self._decisions).get(_source(rest))
        return orjson.dumps(value, default=sorted) if value else b""

    @classmethod
    def read(cls, values: Mapping[str, bytes]) -> EpisodeRules:
        """The book of which these are all names and values, also where a later release has added fields to them.

        Raises ValueError, TypeError or KeyError for what is no such value.
        """
        book = cls()
        opened: list[_Open] = []
        for name, value in values.items():
            kind, _, rest = name.partition("|")
            if kind == "e":
                opened.append(_Open.from_json(value))
            elif kind == "a":
                book._applied[_source(rest)] = _Applied(**_known(_Applied, orjson.loads(value)))
            elif kind == "d":
                book._decisions[_source(rest)] = [_decision(found) for found in orjson.loads(value)]
        for found in sorted(opened, key=lambda found: found.turn):
            book._turn = found.turn - 1
            book._keep(found, moved=True)
        book.changed.clear()
        return book


_NOTHING = _Applied(-1, 0, 0)
_AFTER = 1 << 24
"""An index in a message that comes after all of them."""


def _kind(cause: str) -> str:
    return "record" if cause.startswith("record:") else "sequence"


def _family(cause: str) -> str:
    """The cause, of a rate without the time over which it was counted: an hour's and a day's are one."""
    return cause.rpartition(".")[0] if cause.startswith("rate:") else cause


def _next(noticed_at: int) -> int:
    """The number after `noticed_at` that is told again: 2, then powers of ten."""
    return 2 if noticed_at < 2 else 10 ** len(str(noticed_at))


def _hash(name: str) -> str:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def _episode(found: dict[str, Any]) -> Episode:
    return Episode(**_known(Episode, found) | {"causes": tuple(found["causes"]), "others": tuple(found["others"])})


def _decision(found: dict[str, Any]) -> Decision:
    read = {"source": tuple(found["source"]), "episode": _episode(found["episode"])}
    return Decision(**_known(Decision, found | read))


def _known(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    """Those of a value's fields that this release has. A field is added with a default, and else the format changes."""
    return {field.name: found[field.name] for field in fields(kind) if field.name in found}


def _name(source: SourcePartition) -> str:
    return f"{source[1]}|{source[0]}"


def _source(name: str) -> SourcePartition:
    partition, topic = name.split("|", 1)
    return topic, int(partition)
