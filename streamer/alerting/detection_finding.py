"""Alerts as OCSF 1.8 Detection Findings (class 2004), ready for the alert topic.

Promises that every alert validates against the published schema whatever the event holds, that the same event, entity,
cause and bundle always give the same ids, and that all text has passed the redactor. It does not decide which events
are alerts, nor which belong to one episode: a `Decision` does. `docs/alerts.md` describes every field.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from encoder.models.text_shapes import TextFinding
from encoder.ocsf.entities import RULES
from encoder.ocsf.event_time import NO_TIME
from state.episodes import CREATE, Decision, Episode
from streamer.alerting import text as wording
from streamer.alerting.finding_frame import Alert, Frame, confidence, finding_uid
from streamer.alerting.observables import DEVICE, evidence, fit, observables
from streamer.detection.batches import ScoredBatch
from streamer.detection.live_calibration import Lowered
from streamer.explain.attribution import Explanation, FieldFinding, Stretch
from streamer.explain.peer_comparison import CHANGE, COUNT, EVENT, LESS, MORE, PeerComparison
from streamer.explain.rates import RateFinding
from streamer.redaction import MASK, Redacted, Redactor, mask_text

MAX_RAW = 16 * 1024
"""Characters of the event's JSON in `raw_data`."""
MAX_NEIGHBOURS = 3
MAX_WINDOW = 64
WORTH_EXPECTING = 0.2
"""The least probability of an expected event that a sequence alert names."""
WORTH_NAMING = 0.2
"""The least share of the surprise at which the title of a sequence names an earlier record."""
WORTH_WEIGHT = 0.01
"""The least share of the surprise that is stated beside a record of a sequence."""
P_FLOOR = 1e-12
"""Alerts state no smaller p-value: below this it is not a measurement."""
_INSTEAD = {"sequence:silence": "After that, usual is", "sequence:missing": "Shortly before the last, usual is"}
_PARTNERS = {
    "address": ("src_endpoint.ip",),
    "host": ("device.hostname", "device.name", "src_endpoint.hostname"),
    "service": ("service.name", "actor.app_name", "app_name"),
    "destination": ("dst_endpoint.ip", "dst_endpoint.hostname"),
}
"""The attributes that name the partner of a cause `first:WHAT`."""
_IDENTITY = ("time", "uid", "correlation_uid", "offset", "sequence")


def build_alerts(
    scored: ScoredBatch,
    rows: NDArray[np.intp],
    explanations: Sequence[Explanation],
    *,
    threshold: float | NDArray[np.float64],
    bundle_version: str,
    tenant: str,
    now_ms: int,
    redactor: Redactor | None = None,
    decisions: Sequence[Decision] | None = None,
) -> list[Alert]:
    """One alert for each of `rows`, in their order.

    explanations and (where given) decisions: one a row, of activity CREATE or UPDATE; without decisions every event is
    a Create of its own. threshold: the p-value at or under which an event is an alert, one for all or float64 [rows].
    now_ms: epoch ms of making the alerts. Raises ValueError where the lengths differ.
    """
    redactor = redactor or Redactor()
    episode_so_far = decisions if decisions is not None else [None] * len(rows)
    thresholds = np.broadcast_to(threshold, len(rows)).tolist()
    return [
        _Finding(scored, int(row), explanation, decision, crossed, bundle_version, tenant, now_ms, redactor).alert()
        for row, explanation, decision, crossed in zip(rows, explanations, episode_so_far, thresholds, strict=True)
    ]


class _Finding:
    """One finding: the scored and explained event, redacted, and the parts of the alert made from it."""

    def __init__(
        self,
        scored: ScoredBatch,
        row: int,
        explanation: Explanation,
        decision: Decision | None,
        threshold: float,
        bundle_version: str,
        tenant: str,
        now_ms: int,
        redactor: Redactor,
    ) -> None:
        at = scored.coordinates
        self.coordinates = at.label(row)
        topic, partition = at.sources[at.source[row]]
        index = int(at.index[row])
        self.source = {"topic": topic, "partition": int(partition), "offset": int(at.offset[row]), "index": index}
        self.row, self.time = row, int(scored.time[row])
        self.p_value, self.threshold = max(float(scored.p_value[row]), P_FLOOR), float(threshold)
        severity = float(scored.severity[row])
        severity = min(100.0, max(0.0, severity)) if math.isfinite(severity) else 0.0
        self.complete = scored.complete is None or bool(scored.complete[row])
        self.lowered: Lowered | None = None if scored.lowered is None else scored.lowered[row]
        self.bundle, self.tenant, self.now = bundle_version, tenant, now_ms
        redacted = scored.redacted(row, redactor)
        self.record, self.cut = redacted.record, redacted.cut
        self.cause = str(scored.cause[row])
        self.ids = (str(scored.entity[row]), self.cause)
        self.entity = redacted.entity(self.ids[0])
        self.fields = tuple(
            replace(
                f,
                observed=redactor.text(f.path, str(f.observed)),
                given=", ".join(redacted.text(name) for name in f.of) or redacted.text(f.given),
                expected=tuple((redactor.text(f.path, str(text)), float(p)) for text, p in f.expected),
                part=f.part and _masked_part(f.part, redactor.text(f.path, str(f.observed)), redactor),
            )
            for f in explanation.fields
        )
        self.neighbours = [
            {path: redactor.text(path, value if isinstance(value, str) else str(value)) for path, value in n.items()}
            for n in explanation.neighbours[:MAX_NEIGHBOURS]
        ]
        self.distance, self.usual_distance = float(explanation.distance), float(explanation.usual_distance)
        self.rates = explanation.rates
        self.peers = explanation.peers and _masked(explanation.peers, redactor)
        likely = ((self._example_summary(like, redactor), float(p)) for like, p in explanation.instead if like)
        self.instead = [(what, p) for what, p in likely if WORTH_EXPECTING <= p <= 1]
        self.window = [
            (int(time), str(label), self._summary(str(label), like, redactor), _share(float(share)))
            for time, label, like, share in explanation.window[-MAX_WINDOW:]
        ]
        self.stretch = explanation.stretch and self._shown_stretch(explanation.stretch, redacted, redactor)
        self.activity = decision.activity if decision else CREATE
        if self.time == NO_TIME:
            self.time = decision.episode.last_seen if decision else now_ms
        alone = Episode(
            self.coordinates, self.coordinates, *self.ids[:1], self.entity, self.cause, self.time, self.time
        )
        self.episode = decision.episode if decision else alone
        self.first_seen = min(self.episode.first_seen, self.time, *(time for time, *_ in self.window))
        self.last_seen = max(self.episode.last_seen, self.time)
        self.severity = max(severity, self.episode.severity)

    def _summary(self, label: str, like: Mapping[str, Any], redactor: Redactor) -> str:
        """The summary of an event of the window: of the alerted event itself, else of the normal event like it."""
        if label == self.coordinates:
            return self.own_summary()
        return self._example_summary(like, redactor)

    def _shown_stretch(self, stretch: Stretch, redacted: Redacted, redactor: Redactor) -> dict[str, Any]:
        """The stretch as it stands in `unmapped.stretch`."""
        finding, differing = stretch
        return {
            "entity": redacted.entity(finding.entity),
            "events": finding.steps,
            "distance": round(finding.distance, 4),
            "usual_distance": round(finding.usual_distance, 4),
            "differing": [
                {"summary": self._example_summary(like, redactor), "here": here, "nearest_normal": there}
                for like, here, there in differing
            ],
        }

    def own_summary(self) -> str:
        return wording.summary({path: _text_at(self.record, path) for path in wording.SUMMARY_PATHS})

    @staticmethod
    def _example_summary(like: Mapping[str, Any], redactor: Redactor) -> str:
        """The summary of a normal event, as it may be shown; `like` is empty where training had none like it."""
        shown = {path: redactor.text(path, str(value)) for path, value in like.items()}
        return wording.summary(shown) if like else "an event like none in training"

    def alert(self) -> Alert:
        title = self.title()
        raw, whole = self.raw()
        evidence_ = self.evidence()
        episode = self.episode
        finding = finding_uid(episode.first, episode.entity, episode.cause)
        frame = Frame(self.activity, self.coordinates, self.ids, finding, self.bundle, self.tenant, self.now)
        value = frame.value(
            severity=self.severity,
            confidence=confidence(min(self.p_value, max(episode.p_value, P_FLOOR)), self.threshold),
            first_seen=self.first_seen,
            last_seen=self.last_seen,
            count=episode.count,
        )
        if not whole:
            value["metadata"]["is_truncated"] = True
        value |= {
            "message": f"{title} ({wording.moment(self.time)})",
            "finding_info": self.finding_info(frame, title),
            "evidences": [evidence_],
            "observables": observables(evidence_, "evidences[0]"),
            "anomaly_analyses": [self.analysis()],
            "raw_data": raw,
            "unmapped": self.unmapped(),
        }
        device = fit(DEVICE, evidence_.get("device"))
        if device is not None:
            value["device"] = device
        return frame.alert(value, episode.shown, self.row)

    def leading(self) -> FieldFinding | None:
        """The field of the cause, else the one that contributed most."""
        path = self.cause.partition(":")[2]
        return next((f for f in self.fields if f.path == path), self.fields[0] if self.fields else None)

    def title(self) -> str:
        """What was unusual, in one line, and at how many other entities it happened."""
        return self.what() + wording.further_entities("; the same", self.episode.entities - 1)

    def what(self) -> str:
        kind, _, cause = self.cause.partition(":")
        record = self.record
        if self.cause == "sequence:missing":
            return self.missing_in_short()
        if kind == "sequence":
            who = wording.subject(self.entity, record)
            what = "first event" if len(self.window) == 1 else wording.sequence(cause)
            return f"Unusual {what}{who}{self.sequence_in_short()}"
        if self.rates:
            who = wording.subject(self.entity, {})  # The events of a rate may come from several hosts.
            return f"Unusually {wording.rate(cause)[0]}{who}: {self.rates_in_short()}"
        if kind == "first":
            value = next((v for path in _PARTNERS.get(cause, ()) if (v := _text_at(record, path))), "")
            return wording.cooccurrence_title(self.action("", {value}), cause, wording.shorten(value, 60))
        field = self.leading()
        if field is None:
            where = wording.event_kind(record)
            return f"Unusual {where}{wording.subject(self.entity, record)}: like none seen before"
        if field.part is not None:
            part = wording.text_part(field.part)
            where = f" in {self.action(field.path, {field.given, field.observed})}"
            return f"Unusual {part.name}: {part.shown}{where}{f'; {part.usual}' if part.usual else ''}"
        name, shown = wording.attribute(field.path), wording.value(field.path, field.observed, record)
        usual = wording.usually(field.path, field.observed, field.expected, record)
        if field.path in ("class_uid", "type_uid"):
            where = wording.subject(self.entity, record, field.path, {field.given, field.observed})
        else:
            where = f" in {self.action(field.path, {field.given, field.observed})}"
        shown = f": {shown}" if shown in ("yes", "no") else f" {shown}"
        level = wording.compared(field.path, field.observed, field.expected)
        if field.given:
            of = f"no {name}" if field.observed in wording.MISSING else f"{level} {name}{shown}".lstrip()
            new = ", never seen before," if field.new else ""
            what = f"Unusual for {wording.shorten(field.given, 60)}: {of}{new}"
        elif field.observed in wording.MISSING:
            what = f"No {name}"
        elif field.new:
            what = f"Never seen before: {name}{shown}"
        else:
            what = f"{f'Unusually {level}' if level else 'Unusual'} {name}{shown}"
        return f"{what}{where}{f'; {usual}' if usual else ''}"

    def action(self, skip_path: str, skip_names: Collection[str]) -> str:
        """What was done, and by whom: "launch of cmd.exe by user bob". Arguments as in `wording.action`."""
        what, who = (
            wording.action(self.record, skip_path, skip_names),
            wording.subject(self.entity, self.record, skip_path, skip_names),
        )
        if " of " in what:  # "launch of X": avoid a second "of".
            who = f"{' on' if who.startswith(' of host') else ' by'}{who.removeprefix(' of')}"
        return f"{what}{who}"

    def rates_in_short(self) -> str:
        """The counts of a rate: "about 23 within two hours, never more than 3 before; also 35 events (never more than
        19)"."""
        first, *further = self.rates
        shown = [f"{_beside(rate, first)} ({_at_most(rate).removesuffix(' before')})" for rate in further]
        also = f"; also {' and '.join(shown)}" if shown else ""
        return f"about {_beside(first, None)}, {_at_most(first)}{also}"

    def sequence_in_short(self) -> str:
        if not self.window:  # The entity did so much since that its window no longer holds this event.
            return f": {wording.shorten(self.own_summary())}"
        newest = wording.shorten(self.window[-1][2])
        instead = [(what, p) for what, p in self.instead if what != newest]
        usual = f"; usually {wording.shorten(instead[0][0])} ({wording.percent(instead[0][1])})" if instead else ""
        if self.cause == "sequence:silence":
            length = wording.duration(self.window[-1][0] - self.window[0][0])
            return f": nothing after {newest}, the last of {len(self.window)} events in {length}{usual}"
        if len(self.window) == 1:
            return f": {newest}{usual}"
        # Name the earlier record with the largest weight; of equal ones the latest.
        earlier = max(self.window[-2::-1], key=lambda entry: entry[3])
        before = earlier if earlier[3] >= WORTH_NAMING else self.window[-2]
        return f": {newest} after {wording.shorten(before[2])}{usual}"

    def missing_in_short(self) -> str:
        """The title of a missing step: what was done, and what usually comes shortly before it."""
        newest = self.window[-1][2] if self.window else self._summary(self.coordinates, {}, Redactor())
        who = wording.subject(self.entity, self.record)
        who = f" by{who.removeprefix(' of')}" if who.startswith(" of ") else who
        title = f"Missing step before {wording.shorten(newest)}{who}"
        if not self.instead:
            return f"{title}: what usually comes shortly before did not"
        came, share = wording.shorten(self.instead[0][0]), wording.percent(self.instead[0][1])
        return f"{title}: no {came}, which comes shortly before in {share} of cases"

    def description(self) -> str:
        record = self.record
        sentences = [
            f"{wording.moment(self.time)}: {wording.event_kind(record)}{wording.subject(self.entity, record)}."
        ]
        # Each event of a sequence may be normal by itself: do not list its attributes.
        sentences += [f"- {_rate_sentence(rate, self.entity.partition(':')[0])}." for rate in self.rates]
        for f in () if self.window or self.rates else self.fields:
            shown = wording.value(f.path, f.observed, record)
            usual = wording.usually(f.path, f.observed, f.expected, record)
            name = wording.attribute(f.path)
            path = "" if name == f.path else f" ({f.path})"
            whose = f" for {wording.shorten(f.given, 60)}" if f.given else ""
            rare = "never seen in training" if f.new else f"expected {wording.one_in(f.surprise)}{whose}"
            if f.part is not None:
                odd = wording.text_part(f.part)
                shown, usual = f"{odd.name}: {odd.shown}", odd.usual
                rare = f"expected {wording.one_in(f.part.surprise)}"
            sentences.append(f"- {name}{path}: {'; '.join(filter(None, (shown, usual, rare)))}.")
        for time, label, summary, share in self.window[-10:]:
            part = f"without it {wording.percent(share)} less surprising; " if share >= WORTH_WEIGHT else ""
            sentences.append(f"- {wording.moment(time)}: {wording.shorten(summary)} ({part}{label}).")
        if self.instead:
            place = _INSTEAD.get(self.cause, "In place of the last, usual is")
            likely = " or ".join(f"{wording.shorten(what)} ({wording.percent(p)})" for what, p in self.instead[:3])
            sentences.append(f"{place} {likely}.")
        if self.stretch:
            sentences.append(wording.stretch(**self.stretch))
        if known := self.peers_in_training():
            sentences.append(known)
        if self.neighbours:
            differs = self.differences(self.neighbours[0])
            sentences.append(
                f"The nearest normal event {f'differs in {differs}' if differs else 'looks the same by itself'}."
            )
        if self.usual_distance > 0 and math.isfinite(self.distance) and self.distance > self.usual_distance:
            times = f"{self.distance / self.usual_distance:.2g}"
            sentences.append(f"It is {times} times as far from the nearest normal event as normal events are.")
        if self.episode.count > 1:
            sentences.append(self.episode_so_far())
        if self.lowered is not None:
            lowered = self.lowered
            sentences.append(wording.lowered(lowered.fields, lowered.parts, lowered.share, lowered.since))
        if not self.complete:
            sentences.append(
                "Part of what its entities did before is not known, so it may look more unusual than it is."
            )
        rare, limit = wording.one_in(_nats(self.p_value)), wording.one_in(_nats(self.threshold))
        sentences.append(f"Of normal events, {rare} would look as unusual as this; alerts begin at {limit}.")
        sentences.append(f"Event {self.coordinates}, judged by {self.bundle}.")
        return "\n".join(sentences)

    def peers_in_training(self) -> str:
        """What peers did in training, as a sentence; "" for counts, which state it themselves."""
        peers = self.peers
        if peers is None or peers.what == COUNT or not (peers.count or peers.itself or peers.what == CHANGE):
            return ""
        if peers.what == CHANGE:
            did = wording.number_of_peers(peers.kind, peers.count, peers.among)
            return f"In training {did} went from one usual {peers.of} to another within an hour."
        what = "events like it"
        if peers.what != EVENT:
            observed = next((f.observed for f in self.fields if f.path == peers.of), "")
            shown = wording.value(peers.of, observed, self.record)
            limit = {MORE: " or more", LESS: " or less"}.get(peers.what, "")
            what = f"{wording.attribute(peers.of)} {shown}{limit} in such events"
        known = peers.kind, peers.count, peers.among, peers.names
        return wording.peers_sentence(what, *known, itself=peers.itself, at_least=peers.at_least)

    def episode_so_far(self) -> str:
        """The episode so far, as a sentence."""
        episode = self.episode
        length = wording.duration(episode.last_seen - episode.first_seen)
        causes = ", ".join(wording.cause(cause) for cause in episode.causes)
        summary = f"So far {episode.count:,} such events in {length}, the first at {episode.first} ({causes})."
        names = ", ".join(episode.others[:10])
        more = episode.entities - 1 - len(episode.others[:10])
        return f"{summary} Also at {names}{f' and {more:,} more' if more > 0 else ''}." if names else summary

    def differences(self, normal: Mapping[str, str]) -> str:
        """The attributes in which the event differs from a normal one, at most four."""
        differing = []
        for path, usual in normal.items():
            here = _text_at(self.record, path)
            if path.rsplit(".", 1)[-1] in _IDENTITY or here is None or here == usual:
                continue
            name, was = wording.attribute(path), wording.value(path, usual, self.record)
            differing.append(f"{name} ({wording.value(path, here, self.record)} here, {was} there)")
        return ", ".join(differing[:4])

    def finding_info(self, frame: Frame, title: str) -> dict[str, Any]:
        metadata = self.record.get("metadata")
        metadata = metadata if isinstance(metadata, Mapping) else {}
        product = metadata.get("product")
        source = product.get("name") if isinstance(product, Mapping) else None
        event_uid = metadata.get("uid")
        related: list[dict[str, Any]] = [
            {
                "uid": event_uid if isinstance(event_uid, str) and event_uid else self.coordinates,
                "title": wording.event_kind(self.record),
                "desc": f"the event at {self.coordinates}",
                "first_seen_time": self.time,
                "last_seen_time": self.time,
            }
        ]
        type_uid = self.record.get("type_uid")
        if isinstance(type_uid, int) and not isinstance(type_uid, bool):
            related[0]["type_uid"] = type_uid
        related += [
            {"uid": label, "title": wording.shorten(summary), "first_seen_time": time, "last_seen_time": time}
            for time, label, summary, _ in self.window
            if label != self.coordinates
        ]
        return {
            "uid": frame.finding,
            "title": title,
            "desc": self.description(),
            **frame.analytic,
            "created_time": self.now,
            "first_seen_time": self.first_seen,
            "last_seen_time": self.last_seen,
            "related_events": related,
            "related_events_count": max(self.episode.count, len(related)),
            **({"data_sources": [source]} if isinstance(source, str) and source else {}),
        }

    def evidence(self) -> dict[str, Any]:
        fitted = evidence(self.record)
        data: dict[str, Any] = {f.path: f.observed for f in self.fields}
        if not data:
            data = {k: v for k, v in list(self.record.items())[:20] if isinstance(v, str | int | float)}
        return {**fitted, "data": data}

    def analysis(self) -> dict[str, Any]:
        """Observed against expected: counts, fields, and last the distance to normal events."""
        anomalies: list[dict[str, Any]] = [
            {
                "observation_parameter": f.path,
                "observation_type": wording.attribute(f.path),
                "observations": [{"value": f.observed}],
                "observed_pattern": _pattern(f),
            }
            for f in self.fields
        ]
        baselines: list[dict[str, Any]] = [
            {
                "observation_parameter": f.path,
                "observation_type": wording.attribute(f.path),
                "observations": [{"value": text} for text, _ in f.expected],
                "observed_pattern": ", ".join(f"{text} ({wording.percent(p)})" for text, p in f.expected),
            }
            for f in self.fields
            if f.expected
        ]
        for place, rate in enumerate(self.rates):
            parameter = {"observation_parameter": f"{rate.count}.{rate.span}", "observation_type": _counted(rate)}
            seen, usual = (wording.amount(rate.count, x) for x in (rate.observed, rate.usual))
            anomalies.insert(
                place, {**parameter, "observations": [{"value": seen}], "observed_pattern": _at_most(rate)}
            )
            baselines.insert(place, {**parameter, "observations": [{"value": usual}]})
        distance = {
            "observation_parameter": "distance",
            "observation_type": "distance to the nearest normal event",
        }
        anomalies.append({**distance, "observations": [{"value": f"{self.distance:.4g}"}]})
        baselines.append({**distance, "observations": [{"value": f"{self.usual_distance:.4g}"}]})
        return {
            "analysis_targets": [
                {"name": self.entity or "the event", "type": self.entity.partition(":")[0] or "event"}
            ],
            "anomalies": anomalies,
            "baselines": baselines,
        }

    def raw(self) -> tuple[str, bool]:
        """The redacted event as JSON, and whether it is complete."""
        text = orjson.dumps(self.record, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        return (text, not self.cut) if len(text) <= MAX_RAW else (f"{text[:MAX_RAW]}…", False)

    def unmapped(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "source": self.source,
            "bundle": self.bundle,
            "entity": self.entity,
            "cause": self.cause,
            "p_value": self.p_value,
            "line": self.threshold,
            "severity_score": round(self.severity, 1),
            "episode": episode_fields(self.episode),
        }
        if not self.complete:
            fields["history_complete"] = False
        if new := sorted({f.path for f in self.fields if f.new}):
            fields["new_values"] = new
        if (lowered := self.lowered) is not None:
            fields["lowered"] = {
                "fields": list(lowered.fields),
                "parts": list(lowered.parts),
                "share": lowered.share,
                "since": lowered.since,
            }
        if (peers := self.peers) is not None:
            fields["peers"] = {**asdict(peers), "names": list(peers.names)}
        if self.neighbours:
            fields["nearest_normal"] = self.neighbours
        if self.stretch:
            fields["stretch"] = self.stretch
        if self.window:
            fields["timeline"] = [
                {"time": time, "event": label, "summary": summary, "share": round(share, 4)}
                for time, label, summary, share in self.window
            ]
        return fields


def episode_fields(episode: Episode) -> dict[str, Any]:
    """An episode as it stands in `unmapped.episode`."""
    found: dict[str, Any] = {
        "entity": episode.shown,
        "first": episode.first,
        "last": episode.last,
        "events": episode.count,
        "entities": episode.entities,
        "causes": list(episode.causes or (episode.cause,)),
    }
    return found | ({"others": list(episode.others)} if episode.others else {})


def _counted(rate: RateFinding) -> str:
    return wording.rate(f"{rate.count}.{rate.span}")[1]


def _rate_sentence(rate: RateFinding, kind: str) -> str:
    reached = (
        f"; reached in training by {wording.number_of_peers(kind, rate.reached, rate.among)}" if rate.among else ""
    )
    return f"about {wording.amount(rate.count, rate.observed)} {_counted(rate)}; {_at_most(rate)}{reached}"


def _beside(rate: RateFinding, first: RateFinding | None) -> str:
    """A count with its unit: "35 events". first: the count that it stands beside; None: it is the first."""
    amount, (_, short) = (
        wording.amount(rate.count, rate.observed),
        wording.rate(f"{rate.count}.{rate.span}", short=first is None),
    )
    if first is not None and rate.span == first.span:
        short = short.partition(" within ")[0]
    return f"{amount} {short}"


def _at_most(rate: RateFinding) -> str:
    if not round(rate.usual):
        return "none before" if rate.own else "others like it seldom have any"
    most = wording.amount(rate.count, rate.usual)
    return f"never more than {most} before" if rate.own else f"others like it seldom more than {most}"


def _masked(peers: PeerComparison, redactor: Redactor) -> PeerComparison:
    """The comparison without secrets: no names where an attribute that names this kind of entity is redacted."""
    hidden = any(redactor.lists(path) for rule in RULES if rule.kind == peers.kind for path in rule.paths)
    return replace(peers, names=() if hidden else tuple(mask_text(name) for name in peers.names))


def _pattern(field: FieldFinding) -> str:
    """How rare an attribute is: "expected 1 in 8,100"; of a text, which part, and what is usual there."""
    if field.part is None:
        return f"expected {wording.one_in(field.surprise)}"
    odd = wording.text_part(field.part)
    rare = f"expected {wording.one_in(field.part.surprise)}"
    return "; ".join(filter(None, (f"{odd.name}: {odd.shown}", odd.usual, rare)))


def _masked_part(part: TextFinding, observed: str, redactor: Redactor) -> TextFinding:
    """The part as it may be shown. observed: the text that it stands in, as it may be shown. A part does not say
    what it is: it is masked with its name, and where something of the text is masked and the rest lacks the part.
    """
    joined = {"?": "=", " ": " "}.get(part.kind, "")
    before = f"{part.label}{joined}" if joined else ""
    shown = redactor.text(part.path, f"{before}{part.part}")
    shown = shown.removeprefix(before) if shown.startswith(before) else MASK
    lower = observed.lower()
    hidden = MASK in observed
    if hidden and part.part.lower() not in lower:
        shown = MASK
    return part._replace(part=shown, label="…" if hidden and part.label.lower() not in lower else part.label)


def _share(x: float) -> float:
    return min(max(x, 0.0), 1.0) if math.isfinite(x) else 0.0


def _nats(p_value: float) -> float:
    return -math.log(p_value) if p_value > 0 else math.inf


def _text_at(record: Mapping[str, Any], path: str) -> str | None:
    """The scalar at a path as text; None where there is none, or a list."""
    node: Any = record
    for part in path.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return str(node) if isinstance(node, str | int | float) else None
