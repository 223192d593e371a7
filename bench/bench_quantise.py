"""How fast the quantisers of the pinned library are, type by type, on one core; and what our call adds to them.

    python bench/bench_quantise.py [--json] [--rows 256] [--columns 2816]

MB of bf16 weights (two bytes a value) per second of processor time, best of three: `ggml_quantize_chunk` once over a
matrix of normal values, and `ggml.quantise.quantise`, which checks every value before and every scale after. With
importances where the type takes them. Tables of the IQ types are built before the clock starts; their time is apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gemcut.ggml.library import load
from gemcut.ggml.quantise import quantise
from gemcut.ggml.types import GgmlType, fits, tensor_bytes
from rows import Line, load_average, row, show

WHOLE = {"I8", "I16", "I32", "I64", "F64"}
RUNS = 3


def seconds(call: Callable[[], object], runs: int = RUNS) -> float:
    best = float("inf")
    for _ in range(runs):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def measure(kind: GgmlType, rows: int, columns: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    importance = (rng.standard_normal(columns) ** 2).astype(np.float32)
    out = np.zeros(tensor_bytes(kind, values.shape), np.uint8)
    dll = load().dll
    tables = seconds(lambda: dll.ggml_quantize_init(kind), runs=1)
    pointers = (values.ctypes.data, out.ctypes.data, 0, rows, columns, importance.ctypes.data)
    kernel = seconds(lambda: dll.ggml_quantize_chunk(kind, *pointers))
    ours = seconds(lambda: quantise(values, kind, importance, out))
    megabytes = 2 * values.size / 1e6
    return {
        "type": kind.name,
        "kernel_mb_s": megabytes / kernel,
        "ours_mb_s": megabytes / ours,
        "table_seconds": tables,
    }


def rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    where = f"a {r['rows_of_matrix']} × {r['columns']} matrix, best of {r['runs']}"
    return [
        row(
            f"{one['type']}, one core",
            "",
            f"kernel {one['kernel_mb_s']:,.1f} MB of bf16 a second, with our checks {one['ours_mb_s']:,.1f}"
            + (f"; its tables once {one['table_seconds']:.2f} s" if one["table_seconds"] >= 0.01 else "")
            + f"; {where}",
        )
        for one in r["types"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2816)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kinds = [kind for kind in GgmlType if kind.name not in WHOLE and fits(kind, options.columns)]
    found = [measure(kind, options.rows, options.columns) for kind in kinds]
    size = {"rows_of_matrix": options.rows, "columns": options.columns}
    answer = {"runs": RUNS, **size, "types": found, "load": load_average()}
    show({**answer, "rows": rows(answer)}, as_json=options.json)


if __name__ == "__main__":
    main()
