"""Timing on a device: compiled before, warmed up, each repetition waited for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

LEAST, MOST, WARM = 5, 40, 2

# Dense TFLOP/s of bfloat16 products. H100 and H200 SXM: NVIDIA's data sheets give 1979 with
# sparsity, so 989 without. MFU is claimed for no other device.
PEAKS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}
PEAK_SOURCE = "NVIDIA, data sheets of the H100 SXM and the H200 SXM: 1979 with sparsity, so 989"


def interleaved(
    calls: Mapping[str, Callable[[], Any]], seconds: float, least: int = LEAST, most: int = MOST
) -> dict[str, list[float]]:
    """Returns the seconds of calls that are made in turn, each of which waits for its device.

    Args:
      calls: what to time, by name.
      seconds: that all of them may take, once each has been timed `least` times.
      least: repetitions of each, whatever they take.
      most: repetitions of each.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM):
        for call in calls.values():
            call()
    begun = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        for name in calls if turn % 2 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summary(values: list[float], factor: float = 1.0) -> dict[str, float]:
    """Returns median, quartiles and count, multiplied by a factor."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle * factor, "q1": low * factor, "q3": high * factor, "n": len(values)}


def rates(times: list[float], amount: float) -> dict[str, float]:
    """Returns the summary of amounts a second."""
    return summary([amount / t for t in times])


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Returns the summary of the quotients of two interleaved series, turn by turn."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def flops_per_token(config: Any, tokens: int) -> float:
    r"""Returns the model's floating-point operations for one token of training.

    $6 N + 6 L H K T$: N are the weights that multiply (not the table that is looked up), forward
    and twice backward; attention's two products are over the T / 2 keys that a token sees on
    average. What a step computes again (remat) does not count.

    References:
      Chowdhery et al. 2022, PaLM, appendix B, where attention counts without the causal mask.
    """
    D, K = config.width, config.per_head
    block = D * K * (2 * config.heads + 2 * config.groups) + 3 * D * config.hidden
    weights = config.layers * block + config.vocabulary * D
    return 6.0 * weights + 6.0 * config.layers * config.heads * K * tokens


def utilisation(tokens_per_s: float, flops: float, device: str) -> float | None:
    """Returns MFU in bf16, or None where the device's peak is not known."""
    peak = PEAKS.get(device)
    return None if peak is None else tokens_per_s * flops / (peak * 1e12)


def peak_bytes(device: Any) -> int | None:
    """Returns the most memory that this process has held on the device; None where unknown."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
