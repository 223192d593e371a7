"""All criteria on a 26B-sized statistics folder, from disk to Scores, in a fresh process.

    python bench/bench_score.py [--json] [--layers 30 --experts 128 --questions 300 --classes 6]

The folder is made once in a temporary place and is not timed. The file cache is warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import Line, row, show

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 5.0


def measure(folder: Path, draws: int) -> dict[str, object]:
    """Seconds of each step; runs in the fresh process."""
    start, cpu = time.perf_counter(), time.process_time()
    from gemcut.plan import plan_experts
    from gemcut.records import load_statistics
    from gemcut.score import CRITERIA, resample, score

    imported = time.perf_counter()
    stats = load_statistics(folder)
    loaded = time.perf_counter()
    criteria = {}
    for name in CRITERIA:
        begin = time.perf_counter()
        scores = score(stats, name)
        criteria[name] = round(time.perf_counter() - begin, 4)
    scored, scored_cpu = time.perf_counter(), time.process_time()
    scores = score(stats, "balanced")
    begin, begin_cpu = time.perf_counter(), time.process_time()
    resampled = resample(stats, scores, draws)
    resampling, resampling_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    begin = time.perf_counter()
    plan_experts(scores, stats.meta.experts * 98 // 128, stats=stats, resampled=resampled)
    planning = time.perf_counter() - begin
    return {
        "import_seconds": round(imported - start, 4),
        "load_seconds": round(loaded - imported, 4),
        "criteria_seconds": criteria,
        "all_scores_seconds": round(scored - start, 4),
        "all_scores_cpu_seconds": round(scored_cpu - cpu, 4),
        "resample_cpu_seconds": round(resampling_cpu, 4),
        "resample_seconds": round(resampling, 4),
        "resample_draws": draws,
        "plan_seconds": round(planning, 4),
    }


def rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    size = f"{r['layers']} × {r['experts']}, {r['questions']} questions, {len(r['criteria_seconds'])} criteria, n = 1"
    resample = r["resample_seconds"] + r["plan_seconds"]
    return [
        row("`score`, all criteria, from disk", f"≤ {LIMIT_SECONDS:g} s", f"{r['all_scores_seconds']:.2f} s; {size}"),
        row(f"`plan` with {r['resample_draws']} resamples", "", f"{resample:.2f} s"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.draws)))
        return 0

    sys.path.insert(0, str(ROOT))
    import numpy as np
    from tests.score.synthetic_stats import make_statistics, write_statistics

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "statistics"
        stats = make_statistics(
            np.random.default_rng(0),
            [f"class{i}" for i in range(args.classes)],
            L=args.layers,
            E=args.experts,
            Q=args.questions,
            k=8,
        )
        write_statistics(stats, folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        command = [sys.executable, __file__, "--measure", str(folder), "--draws", str(args.draws)]
        begin = time.perf_counter()
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found["process_seconds"] = round(time.perf_counter() - begin, 3)
    found |= {"size_bytes": size, "layers": args.layers, "experts": args.experts, "questions": args.questions}
    found["within_limit"] = found["all_scores_seconds"] <= LIMIT_SECONDS
    found["rows"] = rows(found)
    show(found, as_json=args.json)
    return 0 if found["within_limit"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
