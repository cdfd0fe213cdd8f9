"""Make the tables that a run prints at its end, and the block that it adds to RESULTS.md.

pytest benchmarks --benchmark-only --full --benchmark-json=run.json
python benchmarks/report.py run.json "what changed, in a sentence"

The JSON of gpu.py can be given instead of run.json.
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTESTANTS = ["fastclip", "default", "foreach", "loop"]

Row = dict[str, Any]


def table(rows: list[Row]) -> list[str]:
    """Return rows as a table. Times are medians; errors are relative to the float64 norm."""
    names = CONTESTANTS + ["apex"] * any("apex" in row["ms"] for row in rows)
    header = ["work", "dtype", *(f"{name} ms" for name in names), "x foreach"]
    header += ["GB/s", "of limit", "error ours", "error torch"]
    return markdown([header, *(cells(row, names) for row in rows)])


def cells(row: Row, names: list[str]) -> list[str]:
    times = row["ms"]
    return [
        row["work"] + ", CUDA" * (row["device"] == "cuda"),
        row["dtype"],
        *(f"{times[name]:.3f}" if name in times else "-" for name in names),
        f"{row['speedup']:.2f}",
        f"{row['gbps']:.1f}",
        "-" if row["of_limit"] is None else f"{100 * row['of_limit']:.0f} %",
        *(f"{row['error'][name]:.0e}" for name in ("fastclip", "foreach")),
    ]


def targets_table(targets: list[Row]) -> list[str]:
    """Return a table of the targets, the measured values, and whether the targets are met."""
    words = {True: "met", False: "NOT met"}
    lines = [[t["target"], t["value"], words[t["met"]]] for t in targets]
    return markdown([["target", "seen", ""], *lines])


def launches_table(launches: list[Row]) -> list[str]:
    """Return a table of the microseconds of each launch of launches.cu, by size of the gradients.

    A star means that the host was late in some turns, so that the time may include the host's.
    """
    sizes = list(dict.fromkeys(launch["megabytes"] for launch in launches))
    lines: dict[str, list[str]] = {}
    for launch in launches:
        cell = f"{launch['us']:.1f}" + " *" * bool(launch["late"])
        lines.setdefault(launch["launch"], []).append(cell)
    header = ["launch, µs", *(f"{size:g} MB" for size in sizes)]
    return markdown([header, *([name, *times] for name, times in lines.items())])


def markdown(lines: list[list[str]]) -> list[str]:
    """Return a Markdown table with aligned columns; its first line is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return [padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]]


def results(run: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the rows and texts in the JSON that pytest wrote."""
    found = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    return {f"{kind}s": [one[kind] for one in found if kind in one] for kind in ("row", "text")}


def record_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the JSON that pytest wrote which is to be kept."""
    machine, found = run["machine_info"], results(run)
    device = f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['threads']} threads"
    device += f" and {machine['gpu']}" * bool(machine["gpu"])
    where = {"device": device, "torch": machine["torch"], "commit": run["commit_info"]["id"][:7]}
    return {"where": where, **found}


def gpu_notes(record: dict[str, Any]) -> list[str]:
    """Return what gpu.py prints above its table: versions, and steps that did not succeed."""
    where, lines = record["where"], []
    lines.append(f"Driver {where['driver']}, nvcc {where['nvcc']}, Python {where['python']}.")
    for name, step in record["steps"].items():
        if step["state"] != "done":
            lines.append(f"{name}: {'; '.join([step['state'], *step.get('failures', [])])}.")
    lines += [f"Not measured: {record['refused']}."] if record["refused"] else []
    return lines + ([] if record["complete"] else ["The run is not complete."])


def blocks(record: dict[str, Any]) -> list[str]:
    """Return the paragraphs and tables of a block of RESULTS.md."""
    found = gpu_notes(record) if "steps" in record else []
    for kind, lines in (("targets", targets_table), ("rows", table), ("launches", launches_table)):
        found += ["\n".join(lines(record[kind]))] if record.get(kind) else []
    return [*found, *record["texts"]]


def main(path: str, changed: str) -> None:
    """Append a block to RESULTS.md and keep its numbers as JSON beside it."""
    run = json.loads(Path(path).read_text())
    record = {"changed": changed, **(run if "steps" in run else record_of(run))}
    where, date = record["where"], datetime.date.today().isoformat()
    heading = f"## {date} · {where['commit']} · {where['device']} · torch {where['torch']}"
    with (HERE / "RESULTS.md").open("a") as file:
        file.write("".join(f"\n{block}\n" for block in [heading, changed, *blocks(record)]))
    name, folder = f"{date}-{where['commit']}{'-gpu' * ('steps' in record)}", HERE / "results"
    # A second run of a commit on the same day does not replace the first.
    before = len(list(folder.glob(f"{name}*.json")))
    target = folder / f"{name}{f'-{before + 1}' * bool(before)}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
