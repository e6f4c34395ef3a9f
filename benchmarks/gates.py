"""The bars that the figures are compared with. A missed bar is shown as missed."""

from typing import Any

from benchmarks.case import LIVE, OURS, TRL_PRECOMPUTED

# Tokens of a pair, its prefix once, from which pairs are called long.
LONG = 400


def gates(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For each bar: what it is about, the bar, the figure found, and whether it holds; None without a figure."""
    one, two, exact = report["stage one"], report["stage two"], report["exact"]
    bars = [
        _bar("stage one, pairs per second over the live reference's pass", ">=", 2.2, _speed(one.get(LIVE))),
        _bar("stage one, pairs per second over TRL's precompute", ">=", 2.2, _speed(one.get(TRL_PRECOMPUTED))),
        _bar("stage two, time over the live reference's", "<=", 0.5, two[LIVE]["our_time_over_its"]),
    ]
    if report["machine"]["gpu"]:
        bars.append(_bar("stage two, peak memory over the live reference's", "<=", 0.5, _memory(two)))
    elif report["case"]["vocabulary"] == 49152:
        bars.append(_bar("stage two, peak memory over the live reference's", "<=", 0.4, _memory(two)))
    if not report["machine"]["gpu"]:
        # of a plain product's rate: on short pairs, less of the work is in large products
        is_long = report["case"]["stored_tokens"] > LONG * report["case"]["pairs"]
        for stage, bar in (("stage one", 0.85 if is_long else 0.7), ("stage two", 0.75 if is_long else 0.6)):
            what = f"{stage}, share of the rate of a plain matrix product, useful FLOPs"
            bars.append(_bar(what, ">=", bar, report[stage][OURS].get("share_of_product")))
    return [
        *bars,
        _bar("float32 values against plain float64, nats per token", "<=", 1e-5, exact["values"]),
        _bar("float32 gradients against plain float64, relative", "<=", 1e-5, exact["gradients"]),
    ]


def _bar(what: str, sign: str, bar: float, found: float | None) -> dict[str, Any]:
    holds = None if found is None else found >= bar if sign == ">=" else found <= bar
    return {"what": what, "bar": f"{sign} {bar:g}", "found": found, "holds": holds}


def _speed(other: dict[str, Any] | None) -> float | None:
    return None if other is None else 1 / other["our_time_over_its"]


def _memory(two: dict[str, Any]) -> float | None:
    """Our peak memory over the live reference's, each above its loaded weights: its second model does not count."""
    peaks = [two[name].get("peak_gb") for name in (OURS, LIVE)]
    return None if None in peaks else peaks[0] / peaks[1]
