"""Metrics that are worked out when Prometheus asks for them: drift, how well the baseline is searched, the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from state.baseline.baseline import Baseline
from streamer.detection.drift import DISTRUST, HEALTHY, REFIT, Drift


class DriftCollector(Collector):
    """The drift of whichever detector serves, worked out when Prometheus asks. watched: gives its `Drift`."""

    def __init__(self, watched: Callable[[], Drift]) -> None:
        self._watched = watched

    def collect(self) -> Iterator[GaugeMetricFamily]:
        health = self._watched().health()
        yield _family("drift_events", "Events of the day of event time that drift is judged by", [((), health.events)])
        psi = [((name,), value) for name, value in health.psi.items()]
        yield _family("drift_psi", "Population stability index of a field, live against training", psi, "field")
        unknown = [(("live",), health.unknown), (("training",), health.unknown_in_training)] if health.verdict else []
        yield _family("drift_unknown_share", "Share of values that training did not have", unknown, "where")
        types = [((), health.unseen_types)] if health.verdict else []
        yield _family("drift_unseen_type_share", "Share of events of a type that training did not have", types)
        ratios = [((f"{level:g}",), share / level) for level, share in health.share.items()]
        yield _family("drift_p_value_ratio", "P-values at or under a level, over how many should be", ratios, "level")
        verdicts = [((name,), float(name == health.verdict)) for name in (HEALTHY, REFIT, DISTRUST)]
        yield _family("drift_verdict", "1 for the verdict; none before enough events", verdicts, "verdict")


class BaselineCollector(Collector):
    """The canary of the baseline that serves."""

    def __init__(self, watched: Callable[[], Baseline]) -> None:
        self._watched = watched

    def collect(self) -> Iterator[GaugeMetricFamily]:
        baseline = self._watched()
        seen = baseline.recall
        yield _family("baseline_vectors", "Normal vectors that events are compared with", [((), len(baseline))])
        yield _family("baseline_canary_queries", "Live queries that were also searched exactly", [((), seen.queries)])
        yield _family("baseline_recall", "Share of the nearest that HNSW found, of those queries", [((), seen.share)])
        exact = baseline.serves_exactly or seen.fallen_back
        yield _family("baseline_exact", "1 where search is exact, chosen or as the fallback", [((), float(exact))])


class DeviceCollector(Collector):
    """Memory of the GPU that the detector is on; nothing where it is on the CPU."""

    def __init__(self, watched: Callable[[], torch.device]) -> None:
        self._watched = watched

    def collect(self) -> Iterator[GaugeMetricFamily]:
        device, values = self._watched(), []
        if device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(device)
            values = [(("ours",), torch.cuda.memory_reserved(device)), (("free",), free), (("whole",), whole)]
        yield _family("gpu_memory_bytes", "Memory of the GPU: held by this process, free, all of it", values, "what")


def _family(name: str, text: str, values: Sequence[tuple[tuple[str, ...], float]], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"ripcurrent_{name}", text, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family
