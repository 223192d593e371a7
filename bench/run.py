"""Every performance figure, one after another on this machine, as the tables of docs/bench.md.

    python bench/run.py [--out docs/bench.md] [--only cut,observe] [--records DIR]

Each bench is a process of its own that prints JSON; nothing else should run meanwhile. Ratios are formed inside one
bench, never across machines. With `--records` the JSON answers are kept, and figures not run again come from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Row = tuple[str, str, str]  # what, target, measured


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def start_rows(r: dict[str, Any]) -> list[Row]:
    shown = (
        f"{r['tensors']} tensors, {r['size_bytes'] / 1e9:.1f} GB of headers' worth, median of {r['help']['runs']} runs"
    )
    return [
        ("`gemcut --help`", "≤ 0.2 s", f"{r['help']['median']:.3f} s (a bare Python: {r['python']['median']:.3f} s)"),
        ("`gemcut inspect`, 30 layers of real geometry", "≤ 0.5 s", f"{r['inspect']['median']:.3f} s; {shown}"),
    ]


def score_rows(r: dict[str, Any]) -> list[Row]:
    size = f"{r['layers']} × {r['experts']}, {r['questions']} questions, {len(r['criteria_seconds'])} criteria, n = 1"
    return [
        ("`score`, all criteria, from disk", "≤ 5 s", f"{r['all_scores_seconds']:.2f} s; {size}"),
        (f"`plan` with {r['resample_draws']} resamples", "", f"{r['resample_seconds'] + r['plan_seconds']:.2f} s"),
    ]


def cut_rows(r: dict[str, Any]) -> list[Row]:
    what = (
        f"`cut` {r['experts']}, {r['in_bytes'] / 1e9:.1f} → {r['out_bytes'] / 1e9:.1f} GB, hashes and manifest included"
    )
    rows = [
        (
            f"{what}; {cache} cache",
            "≥ 0.8 of `cp`" if cache == "cold" else "",
            f"{one['cut_speed_of_cp']:.2f} of `cp` ({one['cut_seconds']:.1f} s against {one['cp_seconds']:.1f} s, "
            f"medians of n = {one['n']})",
        )
        for cache, one in r["summary"].items()
    ]
    return [
        *rows,
        ("`cut`, peak memory", "≤ 512 MiB", f"{r['peak_mib']:.0f} MiB"),
        ("`cut`, repeated", "byte-identical", f"{r['byte_identical_runs']} runs identical"),
    ]


def told_rows(r: dict[str, Any]) -> list[Row]:
    """Of a bench that words its own lines."""
    return [(row["what"], row["target"], row["measured"]) for row in r["rows"]]


def memory_rows(r: dict[str, Any]) -> list[Row]:
    where = f"{r['layers']} layers of {r['layer_bytes'] / 2**30:.2f} GiB"
    tokens = {"observe": f", {r['tokens']} tokens", "kld": f", {r['tokens']} tokens, base and one candidate"}
    return [
        (
            f"`{verb}`, peak memory",
            "",
            f"{row['peak_bytes'] / 2**20:.0f} MiB ({where}{tokens.get(verb, '')}; {row['seconds']:.1f} s)",
        )
        for verb, row in r["verbs"].items()
    ]


def mask_rows(r: dict[str, Any]) -> list[Row]:
    n = f"n = {r['tokens']} tokens of {r['items']} items, demo MoE {r['units']} → {r['keep']}, {r['dtype']}, stock "
    n += f"transformers, kept experts in front in both; {r['as_stored']:.1e} with the base's experts in stored order, "
    n += "where its softmax adds the same numbers in another order"
    return [("drop against router-masked base", "max \\|Δlogit\\| = 0.0", f"{r['max_abs_logit_difference']}; {n}")]


BENCHES: dict[str, tuple[list[str], Callable[[dict[str, Any]], list[Row]]]] = {
    "cut": (["bench_cut.py"], cut_rows),
    "observe": (["bench_observe.py"], told_rows),
    "score": (["bench_score.py"], score_rows),
    "heads": (["bench_heads.py", "--only", "heads"], told_rows),
    "solve": (["bench_heads.py", "--only", "solve"], told_rows),
    "mix": (["bench_gguf_mix.py"], told_rows),
    "start": (["bench_start.py"], start_rows),
    "mask": (["bench_mask.py"], mask_rows),
    "memory": (["bench_memory.py"], memory_rows),
}


def processor() -> str:
    """The processor's name, without the machine's."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/bench.md."""
    from gemcut import machine

    lines = [
        "<!-- written by bench/run.py: run it again instead of editing -->",
        "",
        "# Measured figures",
        "",
        f"{processor()}, {machine.cores()} cores, {gib(machine.total_bytes())} of memory, no GPU. "
        f"torch {machine.stack()['torch']}, transformers {machine.stack()['transformers']}. "
        "Synthetic checkpoints have the layer geometry of 26B-A4B (hidden 2816, 128 experts of width 704, dense 2112, "
        "16 heads, 8 and 2 KV heads) and fewer layers; every ratio is formed within one run. "
        "Cuts of heads are measured on the trained demo dense checkpoint.",
        "",
        "| what | target | measured |",
        "|---|---|---|",
    ]
    for name, (_, rows) in BENCHES.items():
        if name in found:
            lines += [f"| {what} | {target} | {measured} |" for what, target, measured in rows(found[name])]
    lines += ["", "```sh", "make bench", "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(BENCHES))
    parser.add_argument("--records", type=Path, default=HERE.parent / "runs" / "bench")
    args = parser.parse_args()
    args.records.mkdir(parents=True, exist_ok=True)
    for name in args.only.split(","):
        command, _ = BENCHES[name]
        print(f"== {' '.join(command)}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, str(HERE / command[0]), *command[1:], "--json"], stdout=subprocess.PIPE, check=False
        )
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            print(f"{name}: no answer (exit {done.returncode})", file=sys.stderr)
            continue
        (args.records / f"{name}.json").write_text(json.dumps(answer, indent=2) + "\n")
    found = {
        name: json.loads((args.records / f"{name}.json").read_text())
        for name in BENCHES
        if (args.records / f"{name}.json").is_file()
    }
    text = page(found)
    if args.out:
        args.out.write_text(text)
    print(text)
    if os.getloadavg()[0] > os.cpu_count():  # type: ignore[operator]
        print("the machine was loaded: do not keep these figures", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
