"""The table a run ends in, and the block it adds to RESULTS.md.

pytest benchmarks --benchmark-only --benchmark-json=run.json
python benchmarks/report.py run.json "what changed, in a sentence"

The JSON of gpu.py is taken as well.
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTESTANTS = ["fastclip", "default", "foreach", "loop"]
HEADER = [
    *("work", "dtype", *(f"{name} ms" for name in CONTESTANTS)),
    *("x foreach", "GB/s", "of limit", "error ours", "error torch"),
]

Row = dict[str, Any]


def cells(row: Row) -> list[str]:
    """A row as text. Times are medians; errors are relative to the float64 oracle."""
    times = row["ms"]
    return [
        row["work"],
        row["dtype"],
        *(f"{times[name]:.3f}" if name in times else "-" for name in CONTESTANTS),
        f"{row['speedup']:.2f}",
        f"{row['gbps']:.1f}",
        "-" if row["of_limit"] is None else f"{100 * row['of_limit']:.0f} %",
        *(f"{row['error'][name]:.0e}" for name in ("fastclip", "foreach")),
    ]


def table(rows: list[Row]) -> list[str]:
    return markdown([HEADER, *map(cells, rows)])


def targets_table(targets: list[Row]) -> list[str]:
    """What a GPU was asked, what it said, and whether that will do."""
    words = {True: "met", False: "NOT met", None: "failed"}
    lines = [[t["target"], str(t["value"]), words[t["met"]]] for t in targets]
    return markdown([["target", "seen", ""], *lines])


def gpu_table(rows: list[Row]) -> list[str]:
    """A line for each contestant's milliseconds, and the bandwidth of one read in that time.

    What others have published is a line as well, and who failed, with the reason."""
    lines = []
    for row in rows:
        for name, ms in (row["ms"] | row.get("published", {})).items():
            speed = f"{row['bytes'] / ms / 1e9:.2f}" if "bytes" in row else "-"
            who = name + ", the host's time included" * (name in row.get("late", []))
            lines.append([row["work"], row["dtype"], who, f"{ms:.4f}", speed])
        for name, why in row.get("failed", {}).items():
            lines.append([row["work"], row["dtype"], f"{name}: {why}", "-", "-"])
    return markdown([["work", "dtype", "who", "ms", "TB/s, one read"], *lines])


def gpu_lines(run: dict[str, Any]) -> list[str]:
    """All that gpu.py's record says, and what it could not say."""
    where, lines = run["where"], []
    lines.append(f"Driver {where['driver']}, nvcc {where['nvcc']}, Python {where['python']}.")
    for name, step in run["steps"].items():
        if step["state"] != "done":
            lines.append(f"{name}: {step['state']}.")
    lines += [f"Refused: {run['refused']}."] if "refused" in run else []
    lines += [] if run["complete"] else ["The run is not complete."]
    separate = [line for one in lines for line in (one, "")]
    return [*separate, *targets_table(run["targets"]), "", *gpu_table(run["rows"])]


def markdown(lines: list[list[str]]) -> list[str]:
    """A table that is also readable as it stands; its first line is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return [padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]]


def main(path: str, changed: str) -> None:
    """Append a block to RESULTS.md and keep the rows as JSON beside it."""
    run = json.loads(Path(path).read_text())
    if run.get("gpu"):
        return write(run | {"changed": changed}, gpu_lines(run))
    rows = [b["extra_info"]["row"] for b in run["benchmarks"] if "row" in b["extra_info"]]
    where = run["benchmarks"][0]["extra_info"]["where"]
    hosts = [b["extra_info"]["host"] for b in run["benchmarks"] if "host" in b["extra_info"]]
    record = {"where": where, "changed": changed, "rows": rows, "hosts": hosts}
    lines = [table(rows)] if rows else []
    lines += [[host] for host in hosts]
    write(record, [line for part in lines for line in ("", *part)][1:])


def write(record: dict[str, Any], lines: list[str]) -> None:
    where, date = record["where"], datetime.date.today().isoformat()
    heading = f"## {date} · {where['commit']} · {where['device']} · torch {where['torch']}"
    with (HERE / "RESULTS.md").open("a") as results:
        results.write("\n".join(["", heading, "", record["changed"], "", *lines, ""]))
    name, results = f"{date}-{where['commit']}{'-gpu' * ('gpu' in record)}", HERE / "results"
    # A second run of a commit does not replace the first.
    before = len(list(results.glob(f"{name}*.json")))
    path = results / f"{name}{f'-{before + 1}' * bool(before)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
