"""What something costs, for tests that compare two costs in one run: CPU time of this process, which what else the
machine does changes little, and the least of several runs, which it changes less."""

from __future__ import annotations

import time
from collections.abc import Callable


def least_cpu_s(call: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of the quickest of some calls, after one that is not counted."""
    call()
    took = []
    for _ in range(times):
        began = time.process_time()
        call()
        took.append(time.process_time() - began)
    return min(took)
