"""The table a run ends in, and the block it adds to RESULTS.md.

pytest benchmarks --benchmark-only --benchmark-json=run.json
python benchmarks/report.py run.json "what changed, in a sentence"
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEADER = [
    *("work", "dtype", "fastclip ms", "default ms", "foreach ms", "loop ms"),
    *("x foreach", "GB/s", "of limit", "error ours", "error torch"),
]

Row = dict[str, Any]


def cells(row: Row) -> list[str]:
    """A row as text. Times are medians; errors are relative to the float64 oracle."""
    times = row["ms"]
    return [
        row["work"],
        row["dtype"],
        *(f"{times[name]:.3f}" for name in ("fastclip", "default", "foreach", "loop")),
        f"{row['speedup']:.2f}",
        f"{row['gbps']:.1f}",
        "-" if row["of_limit"] is None else f"{100 * row['of_limit']:.0f} %",
        *(f"{row['error'][name]:.0e}" for name in ("fastclip", "foreach")),
    ]


def table(rows: list[Row]) -> list[str]:
    """Markdown that is also readable as it stands."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return [padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]]


def main(path: str, changed: str) -> None:
    """Append a block to RESULTS.md and keep the rows as JSON beside it."""
    run = json.loads(Path(path).read_text())
    rows = [b["extra_info"]["row"] for b in run["benchmarks"] if "row" in b["extra_info"]]
    where = run["benchmarks"][0]["extra_info"]["where"]
    date = datetime.date.today().isoformat()
    stamp = f"{date}-{where['commit']}"
    heading = f"## {date} · {where['commit']} · {where['device']} · torch {where['torch']}"
    block = [heading, "", changed, "", *table(rows), ""]
    hosts = [b["extra_info"]["host"] for b in run["benchmarks"] if "host" in b["extra_info"]]
    block += [line for host in hosts for line in (host, "")]
    with (HERE / "RESULTS.md").open("a") as results:
        results.write("\n" + "\n".join(block))
    record = {"where": where, "changed": changed, "rows": rows, "hosts": hosts}
    (HERE / "results" / f"{stamp}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
