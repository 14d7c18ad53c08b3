"""Medians that can be compared: taken in one run, in turns, in an order shuffled each time."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["medians"]


def medians(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 15,
    most: int = 5000,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, float]:
    """The median duration of each run, in microseconds.

    One sample of each is taken per round, so whatever else the machine does at a time falls on all of them.
    The garbage collector works between rounds only.

    Args:
        runs: what to time, by name.
        seconds: for how long to take samples.
        least, most: number of rounds, whatever the time.
        clock: gives nanoseconds.
    """
    samples: dict[str, list[int]] = {name: [] for name in runs}
    order = list(runs)
    for name in order:
        for _ in range(3):
            runs[name]()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        deadline = time.monotonic() + seconds
        for done in range(most):
            if done >= least and time.monotonic() > deadline:
                break
            random.shuffle(order)
            for name in order:
                run = runs[name]
                start = clock()
                run()
                samples[name].append(clock() - start)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: statistics.median(taken) / 1000 for name, taken in samples.items()}
