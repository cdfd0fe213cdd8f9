"""The targets for a GPU, with which gpu.py compares its measurements."""

from typing import Any

Record = dict[str, Any]

# The least share of the speed at which plain calls of torch move the same bytes in the same run.
OF_LIMIT = 0.95
BANDWIDTH = {f"{n} x 64 Mi, {call}" for n in (4, 16, 48) for call in ("norm", "clipped")}
# The least speed relative to torch with `foreach=True`, by work and dtype.
SPEEDUPS = {
    ("GPT-2, unclipped", "fp32"): 3.0,
    ("GPT-2, clipped", "fp32"): 1.1,
    ("Llama 2 7B, unclipped", "bf16"): 3.0,
    ("Llama 2 7B, clipped", "bf16"): 1.2,
    ("Llama 1B / 4, unclipped", "mixed"): 4.0,
    ("Llama 1B / 4, clipped", "mixed"): 1.0,
    ("1000 x 1024, unclipped", "fp32"): 15.0,
}
# The most milliseconds on an H100. NVIDIA-NeMo/Automodel's pull request 3685 has measured 7.89 and
# 3.93 for TransformerEngine on an H100, and 7.32 and 3.73 for a kernel in Triton.
H100_MS = {"6 000 261 x 256, clipped": 3.4, "500 matrices, clipped": 1.2}


def target(name: str, value: str | float, is_met: bool) -> Record:
    value = f"{value:.3g}" if isinstance(value, float) else value
    return {"target": name, "value": value, "met": is_met}


def targets(record: Record) -> list[Record]:
    """Return all targets that can be judged by the steps, rows and launches recorded so far."""
    found = [
        target(name, step["last_line"], step["state"] == "done")
        for name, step in record["steps"].items()
        if not step["state"].startswith("skipped")
    ]
    for row in record["rows"]:
        work, dtype, ms = row["work"], row["dtype"], row["ms"]["fastclip"]
        if work in BANDWIDTH:
            name = f"{work}, {dtype}: of the limit >= {OF_LIMIT}"
            found.append(target(name, row["of_limit"], row["of_limit"] >= OF_LIMIT))
        if least := SPEEDUPS.get((work, dtype)):
            name = f"{work}, {dtype}: x foreach >= {least}"
            found.append(target(name, row["speedup"], row["speedup"] >= least))
        if "H100 80GB HBM3" in record["where"]["device"] and (most := H100_MS.get(work)):
            found.append(target(f"{work}, {dtype}: ms <= {most}", ms, ms <= most))
    return found + launch_targets(record["launches"], record["where"]["l2_bytes"])


def launch_targets(launches: list[Record], l2_bytes: int) -> list[Record]:
    """Return the targets for launches.cu. Lists that fit the L2 cache are clipped in one launch."""
    by_size: dict[float, dict[str, float]] = {}
    for launch in launches:
        by_size.setdefault(launch["megabytes"], {})[launch["launch"]] = launch["us"]
    found, costs = [], []
    for megabytes, us in by_size.items():
        is_fused, work = 1e6 * megabytes <= l2_bytes, f"clip of {megabytes:g} MB"
        how = "fused" if is_fused else "apart"
        costs.append(us[f"{how}, nothing to clip"] - us["norm phase"])
        if is_fused:
            ratio = us["apart, clips"] / us["fused, clips"]
            found.append(target(f"{work}: two launches over one, in time >= 1", ratio, ratio >= 1))
        # The scale phase still finds in the cache part of what the norm phase has read.
        least = 1.1 if 1e6 * megabytes <= l2_bytes * 2 / 3 else OF_LIMIT
        share = (us["norm phase"] + us["copy"]) / us[f"{how}, clips"]
        if megabytes >= 20:
            name = f"{work}, from a cold cache: of a read and a copy >= {least}"
            found.append(target(name, share, share >= least))
    if costs:
        name = "a call that clips nothing: µs beyond the norm phase <= 5"
        found.append(target(name, max(costs), max(costs) <= 5))
    return found
