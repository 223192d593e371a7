"""Peak resident memory and wall time of every verb, on a checkpoint with the real layer geometry.

    python bench/bench_memory.py [--json] [--layers 2] [--folder DIR]

Whole processes as a user would start them. The synthetic weights are random, so that only sizes and times mean
anything. The demo's tokenizer and corpora are used: their vocabulary of 4096 is the synthetic checkpoint's.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
from gemcut import shipped
from gemcut.checkpoint import open_checkpoint
from rows import Line, row, show

# VmHWM begins anew with a new program; ru_maxrss would count the memory of the process that started it.
_VERB = """
import sys
from gemcut.cli.main import main
try:
    main()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def run(*args: str) -> dict[str, float]:
    """One verb: seconds, seconds of processor time and peak resident bytes of its process."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", _VERB, *args, "-q"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"gemcut {args[0]} ended with status {done.returncode}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 2),
        "peak_bytes": int(done.stderr.rpartition("VmHWM:")[2].split()[0]) << 10,
    }


def measure(folder: Path, layers: int, tokens: int) -> dict[str, Any]:
    """Every verb once, in the order of a real job."""
    base, stats, plan, out = folder / "base", folder / "stats", folder / "plan.json", folder / "cut"
    synthetic.write(base, layers=layers)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped.demo_folder() / "moe" / name, base / name)
    checkpoint = open_checkpoint(base)
    prefix = checkpoint.family.layer_prefix(checkpoint.tensors, layers - 1)
    layer = sum(ref.size_bytes for name, ref in checkpoint.tensors.items() if name.startswith(prefix))
    limit = ["--max-tokens", str(tokens)]
    verbs = {
        "inspect": run("inspect", str(base)),
        "observe": run("observe", str(base), "--corpus", "demo:calibration", "-o", str(stats), *limit),
        "score": run("score", str(stats)),
        "plan": run("plan", "experts", str(stats), "--keep", "98", "-o", str(plan)),
        "cut": run("cut", str(base), "--plan", str(plan), "-o", str(out)),
        "verify": run("verify", str(out), "--base", str(base), "--plan", str(plan)),
        "diff": run("diff", str(base), str(out)),
        "kld": run("kld", str(base), str(out), "--corpus", "demo:heldout", *limit),
    }
    return {
        "verbs": verbs,
        "layers": layers,
        "layer_bytes": layer,
        "size_bytes": checkpoint.size_bytes,
        "tokens": tokens,
    }


def rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    where = f"{r['layers']} layers of {r['layer_bytes'] / 2**30:.2f} GiB"
    tokens = {"observe": f", {r['tokens']} tokens", "kld": f", {r['tokens']} tokens, base and one candidate"}
    return [
        row(
            f"`{verb}`, peak memory",
            "",
            f"{one['peak_bytes'] / 2**20:.0f} MiB ({where}{tokens.get(verb, '')}; {one['seconds']:.1f} s)",
        )
        for verb, one in r["verbs"].items()
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        found = measure(Path(temporary), args.layers, args.tokens)
    show({**found, "rows": rows(found)}, as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
