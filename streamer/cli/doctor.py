"""The doctor: whether everything that the service needs is there and well, each in one line that says what to do.

It starts nothing and changes nothing. How scores do (drift, what was spent) is asked of the service that runs, on its
metrics port: only that has seen the traffic.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from state.errors import StateError
from streamer.errors import RipcurrentError
from streamer.service.startup import check_redis
from streamer.settings import Settings, shown

SERVICE_S = 3.0
DISTRUST = "do not trust"


@dataclass(frozen=True)
class Check:
    """mark: ok, warn or bad; what: the part that was looked at; text: one line."""

    mark: str
    what: str
    text: str


def examine(settings: Settings) -> Iterator[Check]:
    """Look at one part after the other. Never raises."""
    yield _looked("bundle", _bundle, settings)
    yield _looked("redis", _redis, settings)
    kafka = _looked("kafka", _kafka, settings)
    yield kafka
    if kafka.mark == "ok":
        yield _looked("ledger", _ledger, settings)
        yield from lowered(settings)
        yield from transactions(settings)
    yield from service(settings)


def _looked(what: str, look: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check("ok", what, look(settings))
    except (RipcurrentError, StateError) as error:
        return Check("bad", what, str(error))


def _bundle(settings: Settings) -> str:
    from streamer.bundles.manifest import resolve, verify

    manifest, _ = verify(resolve(settings.bundle))
    return f"{manifest['version']}, made {manifest['created']}, every file as it was written"


def _kafka(settings: Settings) -> str:
    from streamer.kafka.client import check_topics

    check_topics(settings)
    return f"{settings.kafka.bootstrap_servers} answers and has every topic"


def transactions(settings: Settings) -> Iterator[Check]:
    """Whether an open transaction keeps events back; nothing where none does. Never raises."""
    from streamer.kafka.held_back import held_back

    try:
        found = held_back(settings)
    except RipcurrentError as error:
        found = str(error)
    if found:
        yield Check("warn", "transactions", found)


def _ledger(settings: Settings) -> str:
    if settings.threshold is not None:
        return f"not needed: the threshold is fixed at {settings.threshold:g}"
    from streamer.alerting.threshold_ledger import RecordedThresholds, check_compacted

    check_compacted(settings)
    recorded = len(RecordedThresholds.read(settings))
    return f"{recorded} thresholds are recorded for {settings.alerts_per_day:g} alerts a day"


def lowered(settings: Settings) -> Iterator[Check]:
    """What the live calibration lowers, and since when. Never raises."""
    from streamer.alerting.text import moment
    from streamer.alerting.threshold_ledger import recorded_decisions
    from streamer.bundles.manifest import read_manifest, resolve

    if settings.threshold is not None:
        return
    try:
        version = str(read_manifest(resolve(settings.bundle))["version"])
        decisions = recorded_decisions(settings, version)
    except RipcurrentError as error:
        yield Check("bad", "live calibration", str(error))
        return
    for each in decisions[-1].lowered if decisions else ():
        yield Check("warn", "live calibration", f"counts for less since {moment(each.since)}: {each}")
    if not decisions or not decisions[-1].lowered:
        yield Check("ok", "live calibration", "scores as the bundle was calibrated")


def _redis(settings: Settings) -> str:
    check_redis(settings)
    return f"{shown(settings)['redis.url']} answers"


def service(settings: Settings) -> Iterator[Check]:
    """What the service that runs on this machine says of itself. Never raises."""
    address = {"0.0.0.0": "localhost", "::": "localhost"}.get(settings.metrics_address, settings.metrics_address)  # noqa: S104
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{settings.metrics_port}/metrics"
    if not settings.metrics_port:
        yield Check("warn", "service", "metrics_port is 0: whether it runs and how it does cannot be asked")
        return
    try:
        with urllib.request.urlopen(url, timeout=SERVICE_S) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError) as error:
        yield Check("warn", "service", f"none answers at {host}:{settings.metrics_port} ({error}); drift is not known")
        return
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def labelled(name: str, label: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in samples if s.name == f"ripcurrent_{name}" and label in s.labels}

    def value(name: str) -> float:
        return next((s.value for s in samples if s.name == f"ripcurrent_{name}"), float("nan"))

    serving = next((version for version, on in labelled("bundle_info", "version").items() if on), "a bundle")
    yield Check("ok", "service", f"{serving} serves, {value('events_total'):,.0f} events since it started")
    yield Check(
        "ok",
        "budget",
        f"{value('budget_spent_today'):.0f} alerts of {value('budget_promised_per_day'):g} today, line "
        f"{value('line_p_value'):.3g}",
    )
    widespread = labelled("repair_share", "kind")
    told = ", ".join(f"{kind} in {share:.0%} of recent events" for kind, share in sorted(widespread.items()))
    if widespread:
        yield Check("warn", "repairs", f"{told}; look at what the senders write (docs/reliability.md, Clocks)")
    else:
        yield Check("ok", "repairs", "none touches more than a tenth of recent events")
    verdict = next((name for name, on in labelled("drift_verdict", "verdict").items() if on), "")
    psi = sorted(labelled("drift_psi", "field").items(), key=lambda each: -each[1])[:3]
    shifted = ", ".join(f"{name} {worth:.2f}" for name, worth in psi)
    unknown = labelled("drift_unknown_share", "where")
    if not verdict:
        yield Check("ok", "drift", f"not known yet: {value('drift_events'):,.0f} events of the last day are too few")
        return
    ratios = ", ".join(f"{ratio:.2f} at {level}" for level, ratio in labelled("drift_p_value_ratio", "level").items())
    yield Check(
        "bad" if verdict == DISTRUST else "ok" if verdict == "healthy" else "warn",
        "drift",
        f"{verdict}; most shifted fields {shifted}; unknown values {unknown.get('live', 0):.2%} (in training "
        f"{unknown.get('training', 0):.2%}); p-values over what they should be {ratios}",
    )
