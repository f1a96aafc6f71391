"""The rules by which anomalies become episodes; every store of episodes keeps one `EpisodeRules`.

Promises and limits are those of `state.episodes`. It reads no clock and does no input or output.

The rules. An episode is open until the event time of its partition has passed its last event by `TIMEOUT_MS`. An
anomaly joins the first of these open episodes; without one it begins an episode (Create):

1. *same entity*: the same cause (for rates the same count over any span) and the same entity, or an entity that shares
events with it: an event of one names the other. Two users on one host do not share an episode because of the host. 2.
*same incident*: a sequence or rate anomaly and a record anomaly of such entities, at most `EPISODE_MS` apart, while the
episode has fewer than `MANY_EVENTS` events, so that anomalies in the middle of a storm do not join. 3. *same
elsewhere*: the same cause, type of event and value at other entities, at most `SAME_MS` apart. 4. *mass event*: the
same cause and type with any value, once `MASS_EVENT` such episodes are open that began within `MASS_EVENT_MS`, unless
the severity level is higher than that of the first of them.

A joining anomaly emits an Update when the severity level rises, the cause is new to the episode, the events or the
entities reach 2 or a power of ten, or nothing was emitted for `UPDATE_MS`; otherwise it is only counted.
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
"""Open episodes at once; beyond that, the one without events for longest is closed."""
MAX_SHARING = 32
"""Names kept of entities that share events with an episode, and of further entities that it affects."""
MAX_ENTITIES = 1024
"""Entities counted in one episode; further ones are not counted."""


@dataclass
class _Open:
    """An open episode with the state of its rules. The field names are keys of the stored JSON.

    owner: source of the last event; sharing: other entities that its events name; type_uid, what: of its first event,
    the value as a hash; members: hashes of the affected entities; turn: order of the latest change; told_*: time (ms),
    events and entities at the last alert; crowd: whether it is a mass event, which all similar anomalies join; name:
    its key, the first event, for inactivity also with cause and entity, because an event may be the last of several
    entities.
    """

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
        if not self.what.startswith("#"):  # Release 0.1.0 stored the value.
            self.what = _value_hash(self.what)

    def keys(self) -> Iterator[_Key]:
        """The keys under which it is indexed."""
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
        values = orjson.loads(text)
        read = {
            "episode": _episode(values["episode"]),
            "owner": tuple(values["owner"]),
            "members": set(values["members"]),
        }
        return cls(**_known(cls, values | read))


_Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Applied:
    """The last decided place of a source, and the offset up to which it is known to be committed."""

    offset: int
    index: int
    committed: int
    number: int = 0

    @property
    def place(self) -> Place:
        return self.offset, self.index, self.number


class EpisodeRules:
    """The state of all episodes, and the rules. changed: names of values that must be stored."""

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self._episodes: dict[str, _Open] = {}
        self._applied: dict[SourcePartition, _Applied] = {}
        self._decisions: dict[SourcePartition, list[Decision]] = {}
        self._index: dict[_Key, set[str]] = {}
        self._topics: dict[SourcePartition, int] = {}
        self._clocks: dict[SourcePartition, int] = {}
        """Event time of each source at the anomaly that is being decided."""
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
            if anomaly.time < 0:
                anomaly = replace(anomaly, time=self._clocks[anomaly.source])
            done = self._applied.get(anomaly.source, _NOTHING)
            at = anomaly.place
            # Events before the commit come again only when a person asks for it; then they are decided again.
            if done.committed <= at[0] and at <= done.place:
                continue
            self._set_applied(anomaly.source, max(at, done.place), position)
            joined = self._find(anomaly)
            activity = CREATE if joined is None else self._join(joined, anomaly)
            joined = joined or self._begin(anomaly)
            if activity:
                self._record(Decision(activity, anomaly.source, at[0], at[1], joined.episode, at[2]))
        if ends:
            self._close(ends)
        return [
            decision
            for source, end in ends.items()
            for decision in sorted(self._decisions.get(source, ()), key=lambda d: d.place)
            if end.first <= decision.offset <= end.last
        ]

    def identify(self, topics: Mapping[SourcePartition, int], position: Position) -> list[SourcePartition]:
        """As `EpisodeStore.identify`; gives the sources that are of another topic than before."""
        new = {source: topic for source, topic in topics.items() if self._topics.get(source) != topic}
        other = [source for source in new if source in self._topics]
        for source in other:
            self._forget(source, position.committed.get(source, 0))
            untold = {d.episode.first for d in self._decisions.pop(source, ()) if d.activity == CREATE}
            for found in [found for found in self._episodes.values() if found.episode.first in untold]:
                self._drop(found)
            self._applied.pop(source, None)
            self.changed |= {f"a|{_name(source)}", f"d|{_name(source)}"}
        self._topics |= new
        self.changed |= {f"t|{_name(source)}" for source in new}
        return other

    def _find(self, anomaly: Anomaly) -> _Open | None:
        """The open episode that the anomaly joins, by the rules above."""
        kind, time = _kind(anomaly.cause), anomaly.time
        for candidate in self._of_entities(anomaly, _family(anomaly.cause), TIMEOUT_MS):
            return candidate
        for candidate in self._of_entities(anomaly, "record" if kind == "sequence" else "sequence", EPISODE_MS):
            if candidate.episode.count < MANY_EVENTS and all(
                _kind(cause) != kind for cause in candidate.episode.causes
            ):
                return candidate
        for candidate in self._open_under(
            ("value", anomaly.cause, anomaly.type_uid, _value_hash(anomaly.what)), time, SAME_MS
        ):
            return candidate
        similar = self._open_under(("type", anomaly.cause, anomaly.type_uid), time, TIMEOUT_MS)
        similar = [
            candidate
            for candidate in similar
            if candidate.crowd or time - candidate.episode.first_seen <= MASS_EVENT_MS
        ]
        if len(similar) >= MASS_EVENT or any(candidate.crowd for candidate in similar):
            mass_event = min(
                similar,
                key=lambda candidate: (not candidate.crowd, candidate.episode.first_seen, candidate.episode.first),
            )
            if anomaly.level <= mass_event.episode.level:
                mass_event.crowd = True
                return mass_event
        return None

    def _of_entities(self, anomaly: Anomaly, about: str, timeout_ms: int) -> Iterator[_Open]:
        if anomaly.entity:
            yield from self._open_under(("entity", about, anomaly.entity), anomaly.time, timeout_ms)
            yield from self._open_under(("sharing", about, anomaly.entity), anomaly.time, timeout_ms)
            for name in anomaly.named:
                yield from self._open_under(("entity", about, name), anomaly.time, timeout_ms)

    def _open_under(self, key: _Key, time: int, timeout_ms: int) -> list[_Open]:
        """The open episodes under a key, the latest changed first."""
        names = self._index.get(key)
        if not names:
            return []
        candidates = (self._episodes[name] for name in names)
        open_ = [f for f in candidates if time - f.episode.last_seen <= timeout_ms and not self._is_over(f)]
        return sorted(open_, key=lambda f: -f.turn)

    def _is_over(self, entry: _Open) -> bool:
        """Whether the event time of its partition has passed its last event by TIMEOUT_MS."""
        return self._clocks.get(entry.owner, 0) - entry.episode.last_seen > TIMEOUT_MS

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
        entry = _Open(
            episode,
            anomaly.source,
            [name for name in anomaly.named if name != anomaly.entity][:MAX_SHARING],
            anomaly.type_uid,
            _value_hash(anomaly.what),
            {_hash(anomaly.entity)},
            0,
            anomaly.time,
            name=f"{anomaly.label}|{anomaly.cause}|{anomaly.entity}" if anomaly.noticed_at else anomaly.label,
        )
        self._keep(entry, moved=True)
        return entry

    def _join(self, entry: _Open, anomaly: Anomaly) -> int:
        """Add the anomaly to the episode; returns UPDATE where that is to be published, else 0."""
        old = entry.episode
        own = anomaly.entity == old.entity or anomaly.entity in entry.sharing or old.entity in anomaly.named
        member, others = _hash(anomaly.entity), old.others
        if anomaly.entity and not own and member not in entry.members and len(entry.members) < MAX_ENTITIES:
            entry.members.add(member)
            others = (*others, anomaly.shown)[:MAX_SHARING]
        new_names: list[str] = []
        if own and len(entry.sharing) < MAX_SHARING:
            new_names = [n for n in (*anomaly.named, anomaly.entity) if n != old.entity and n not in entry.sharing]
            entry.sharing = [*entry.sharing, *dict.fromkeys(new_names)][:MAX_SHARING]
        latest = anomaly.time >= old.last_seen
        new_cause = anomaly.cause not in old.causes
        entry.owner = anomaly.source if latest else entry.owner
        now = entry.episode = replace(
            old,
            last=anomaly.label if latest else old.last,
            first_seen=min(old.first_seen, anomaly.time),
            last_seen=max(old.last_seen, anomaly.time),
            count=old.count + 1,
            entities=len(entry.members),
            severity=max(old.severity, anomaly.severity),
            level=max(old.level, anomaly.level),
            p_value=min(old.p_value, anomaly.p_value),
            causes=(*old.causes, anomaly.cause) if new_cause else old.causes,
            others=others,
        )
        self._keep(entry, moved=new_cause or bool(new_names))
        if not (
            new_cause
            or now.level > old.level
            or now.count >= _next(entry.told_count)
            or now.entities >= _next(entry.told_entities)
            or anomaly.time - entry.told_at >= UPDATE_MS
        ):
            return 0
        entry.told_at, entry.told_count, entry.told_entities = anomaly.time, now.count, now.entities
        return UPDATE

    def _close(self, ends: Mapping[SourcePartition, End]) -> None:
        """Close episodes that are over, and beyond MAX_OPEN those without events for longest."""
        for source, end in ends.items():
            tick(self._clocks, source, end.time)
        order = sorted(self._episodes.values(), key=lambda entry: (entry.episode.last_seen, entry.episode.first))
        too_many = len(order) - MAX_OPEN
        for entry in order:
            over = entry.owner in ends and self._is_over(entry)
            if not over and too_many <= 0:
                continue
            too_many -= 1
            source = entry.owner if entry.owner in ends else next(iter(ends))
            self._record(Decision(CLOSE, source, ends[source].last, _AFTER, entry.episode))
            self._drop(entry)

    def _record(self, decision: Decision) -> None:
        self._decisions.setdefault(decision.source, []).append(decision)
        self.changed.add(f"d|{_name(decision.source)}")

    def _forget(self, source: SourcePartition, committed: int) -> None:
        """Drop decisions before the commit: they are published and will not be needed again."""
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

    def _keep(self, entry: _Open, *, moved: bool) -> None:
        """Record a change of an episode. moved: its keys changed, too."""
        name = entry.name
        self._turn += 1
        entry.turn = self._turn
        self._episodes[name] = entry
        self.changed.add(f"e|{name}")
        for key in entry.keys() if moved else ():
            self._index.setdefault(key, set()).add(name)

    def _drop(self, entry: _Open) -> None:
        name = entry.name
        del self._episodes[name]
        self.changed.add(f"e|{name}")
        for key in set(entry.keys()):
            names = self._index[key]
            names.remove(name)
            if not names:
                del self._index[key]

    # The stored form: names and values. It contains the names of fields (state/redis/formats.py).

    def change_all(self) -> None:
        """Mark everything as changed, so that it is stored."""
        self.changed.update(f"e|{name}" for name in self._episodes)
        self.changed.update(f"a|{_name(source)}" for source in self._applied)
        self.changed.update(f"d|{_name(source)}" for source in self._decisions)
        self.changed.update(f"t|{_name(source)}" for source in self._topics)

    def value(self, name: str) -> bytes:
        """The value under a name, empty for none."""
        kind, _, rest = name.partition("|")
        value: Any
        if kind == "e":
            value = self._episodes.get(rest)
        else:
            by_source: dict[str, Mapping[SourcePartition, Any]] = {
                "a": self._applied,
                "d": self._decisions,
                "t": self._topics,
            }
            value = by_source[kind].get(_source(rest))
        return orjson.dumps(value, default=sorted) if value else b""

    @classmethod
    def read(cls, values: Mapping[str, bytes]) -> EpisodeRules:
        """The state whose names and values these are; fields that a later release added are ignored.

        Raises ValueError, TypeError or KeyError for other values.
        """
        rules = cls()
        opened: list[_Open] = []
        for name, value in values.items():
            kind, _, rest = name.partition("|")
            if kind == "e":
                opened.append(_Open.from_json(value))
            elif kind == "a":
                rules._applied[_source(rest)] = _Applied(**_known(_Applied, orjson.loads(value)))
            elif kind == "d":
                rules._decisions[_source(rest)] = [_decision(decision) for decision in orjson.loads(value)]
            elif kind == "t":
                rules._topics[_source(rest)] = orjson.loads(value)
        for entry in sorted(opened, key=lambda entry: entry.turn):
            rules._turn = entry.turn - 1
            rules._keep(entry, moved=True)
        rules.changed.clear()
        return rules


_NOTHING = _Applied(-1, 0, 0)
_AFTER = 1 << 24
"""An index in a message greater than all others."""


def _kind(cause: str) -> str:
    return "record" if cause.startswith("record:") else "sequence"


def _family(cause: str) -> str:
    """The cause; of a rate without its span, because the spans of a count belong together."""
    return cause.rpartition(".")[0] if cause.startswith("rate:") else cause


def _next(count: int) -> int:
    """The next number after `count` that is published: 2, then powers of ten."""
    return 2 if count < 2 else 10 ** len(str(count))


def _hash(name: str) -> str:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def _value_hash(value: str) -> str:
    """The stored form of an event's value, which may be a secret."""
    return f"#{_hash(value)}" if value else ""


def _episode(values: dict[str, Any]) -> Episode:
    return Episode(**_known(Episode, values) | {"causes": tuple(values["causes"]), "others": tuple(values["others"])})


def _decision(values: dict[str, Any]) -> Decision:
    read = {"source": tuple(values["source"]), "episode": _episode(values["episode"])}
    return Decision(**_known(Decision, values | read))


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that this release knows. A new field needs a default; any other change needs a new format."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _name(source: SourcePartition) -> str:
    return f"{source[1]}|{source[0]}"


def _source(name: str) -> SourcePartition:
    partition, topic = name.split("|", 1)
    return topic, int(partition)
