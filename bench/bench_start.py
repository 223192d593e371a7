"""`gemcut --help`, and `gemcut inspect` on headers of real size: 30 layers of 26B-A4B in sparse files.

    python bench/bench_start.py [--json] [--runs 9]

Whole processes, from exec to exit; file cache warm. A bare `python -c pass` in the same run says what Python takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
from rows import Line, row, show

LIMITS = {"help": 0.2, "inspect": 0.5}


def seconds(command: list[str], runs: int) -> dict[str, float]:
    """Least and median wall time of whole processes; the first run warms the cache and does not count."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return {"least": round(min(times[1:]), 4), "median": round(statistics.median(times[1:]), 4), "runs": runs}


def rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    size = f"{r['tensors']} tensors, {r['size_bytes'] / 1e9:.1f} GB of headers' worth"
    python = f"a bare Python: {r['python']['median']:.3f} s"
    return [
        row("`gemcut --help`", f"≤ {LIMITS['help']} s", f"{r['help']['median']:.3f} s ({python})"),
        row(
            "`gemcut inspect`, 30 layers of real geometry",
            f"≤ {LIMITS['inspect']} s",
            f"{r['inspect']['median']:.3f} s; {size}, median of {r['help']['runs']} runs",
        ),
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    gemcut = [sys.executable, "-m", "gemcut.cli.main"]
    with tempfile.TemporaryDirectory() as temporary:
        geometry = synthetic.Geometry(vocabulary=262144)
        folder = synthetic.write(Path(temporary) / "headers", layers=30, geometry=geometry, sparse=True)
        shown = json.loads(
            subprocess.run([*gemcut, "inspect", str(folder), "--json"], check=True, capture_output=True).stdout
        )
        found: dict[str, object] = {
            "python": seconds([sys.executable, "-c", "pass"], args.runs),
            "help": seconds([*gemcut, "--help"], args.runs),
            "inspect": seconds([*gemcut, "inspect", str(folder)], args.runs),
            "tensors": shown["tensors"],
            "size_bytes": shown["size_bytes"],
        }
    found["within_limit"] = all(found[name]["median"] <= limit for name, limit in LIMITS.items())  # type: ignore[index]
    found["rows"] = rows(found)
    show(found, as_json=args.json)
    return 0 if found["within_limit"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
