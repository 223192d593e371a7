"""Cut 128 → 98 experts of a synthetic 26B-A4B, against `cp` of as many bytes on the same disk.

    python bench/bench_cut.py --folder scratch --layers 5 --repeats 3 [--json]

Both sides are timed to durability: `cp` followed by fsync of every file, the cut with its own fsyncs, its hashes of
every tensor before and after, SHA256SUMS and manifest. Runs alternate; each repetition is done once with the source
dropped from the page cache (cold) and once with it just read (warm), with free memory touched beforehand. Peak memory
is VmHWM of the cutting process.
The scratch folder needs about 3.5 times the size of the checkpoint and is removed afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import synthetic
from gemcut.checkpoint import open_checkpoint
from gemcut.records import save_plan
from gemcut.types import LayerPlan, Plan
from rows import Line, row, show

_CUT = """
import sys
from pathlib import Path
from gemcut.checkpoint import open_checkpoint
from gemcut.records import load_plan
from gemcut.surgery import cut
cut(open_checkpoint(Path(sys.argv[1])), load_plan(Path(sys.argv[2])), Path(sys.argv[3]), link=False)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def tree_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def cool(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(folder: Path) -> None:
    """Read the files once."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as f:
            while f.read(8 << 20):
                pass


def hold_memory(size_bytes: int) -> None:
    """Touch memory and let it go. A virtual machine may have given free memory back to its host, and getting it
    again takes longer than copying into it; which of the two runs pays for that would be chance."""
    code = (
        "import mmap, sys; m = mmap.mmap(-1, int(sys.argv[1])); [m.__setitem__(i, 1) for i in range(0, len(m), 4096)]"
    )
    free = psutil.virtual_memory().available - (2 << 30)
    subprocess.run([sys.executable, "-c", code, str(min(size_bytes, free))], check=True)


def time_cp(source: Path, target: Path) -> float:
    """Seconds for cp and fsync."""
    start = time.perf_counter()
    subprocess.run(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(target)], check=True)
    return time.perf_counter() - start


def time_cut(base: Path, plan: Path, out: Path) -> tuple[float, int]:
    """Seconds of a whole process, and its peak memory in KiB."""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", _CUT, str(base), str(plan), str(out)], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start, int(run.stdout)


def a_plan(base: Path, keep: int, target: Path) -> None:
    """Another random set of experts per layer."""
    checkpoint = open_checkpoint(base)
    rng = random.Random(0)
    sites = [site for site in checkpoint.sites if site.kind == "experts"]
    layers = {}
    for site in sites:
        kept = tuple(sorted(rng.sample(range(site.units), keep)))
        layers[site.layer] = LayerPlan(kept, {u: "random" for u in range(site.units) if u not in kept})
    save_plan(Plan("experts", checkpoint.fingerprint, sites[0].units, layers), target, force=True)


def digest(folder: Path) -> str:
    """One hash of all files."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as f:
            whole.update(path.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()


def measure(folder: Path, layers: int, keep: int, repeats: int) -> dict[str, Any]:
    """All runs; removes every large folder that it made."""
    base, plan = folder / "base", folder / "plan.json"
    reference, target = folder / "reference", folder / "target"
    synthetic.write(base, layers=layers)
    a_plan(base, keep, plan)
    time_cut(base, plan, reference)
    wanted = digest(reference)
    out_bytes = tree_bytes(reference)
    runs = []
    for repeat in range(repeats):
        for cache in ("cold", "warm"):
            for kind in ("cp", "cut") if repeat % 2 == 0 else ("cut", "cp"):
                source = reference if kind == "cp" else base
                (cool if cache == "cold" else warm)(source)
                hold_memory(2 * out_bytes + (1 << 30))
                if kind == "cp":
                    seconds, peak = time_cp(source, target), 0
                else:
                    seconds, peak = time_cut(base, plan, target)
                    if digest(target) != wanted:
                        raise SystemExit("two runs differ")
                one = {
                    "kind": kind,
                    "cache": cache,
                    "seconds": round(seconds, 2),
                    "gb_per_s": round(out_bytes / 1e9 / seconds, 3),
                    "peak_mib": round(peak / 1024, 1),
                    "load": round(os.getloadavg()[0], 2),
                }
                print(one, file=sys.stderr, flush=True)
                runs.append(one)
                shutil.rmtree(target)
    base_bytes = tree_bytes(base)
    summary = {}
    for cache in ("cold", "warm"):
        median = {
            kind: statistics.median(r["seconds"] for r in runs if r["kind"] == kind and r["cache"] == cache)
            for kind in ("cp", "cut")
        }
        summary[cache] = {
            "cp_seconds": median["cp"], "cut_seconds": median["cut"], "n": repeats,
            "cut_speed_of_cp": round(median["cp"] / median["cut"], 3),
        }  # fmt: skip
    return {
        "layers": layers, "experts": f"128 → {keep}", "in_bytes": base_bytes, "out_bytes": out_bytes,
        "byte_identical_runs": 2 * repeats + 1, "peak_mib": max(r["peak_mib"] for r in runs), "summary": summary,
        "runs": runs, "cpus": os.cpu_count(), "python": platform.python_version(),
    }  # fmt: skip


def rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    size = f"{r['in_bytes'] / 1e9:.1f} → {r['out_bytes'] / 1e9:.1f} GB"
    speeds = [
        row(
            f"`cut` {r['experts']}, {size}, hashes and manifest included; {cache} cache",
            "≥ 0.8 of `cp`" if cache == "cold" else "",
            f"{one['cut_speed_of_cp']:.2f} of `cp` ({one['cut_seconds']:.1f} s against {one['cp_seconds']:.1f} s, "
            f"medians of n = {one['n']})",
        )
        for cache, one in r["summary"].items()
    ]
    return [
        *speeds,
        row("`cut`, peak memory", "≤ 512 MiB", f"{r['peak_mib']:.0f} MiB"),
        row("`cut`, repeated", "byte-identical", f"{r['byte_identical_runs']} runs identical"),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="scratch folder on the disk to measure; removed")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--keep", type=int, default=98)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(dir=".", prefix="bench-cut-"))
    folder.mkdir(parents=True, exist_ok=args.folder is None)
    try:
        result = measure(folder, args.layers, args.keep, args.repeats)
    finally:
        shutil.rmtree(folder)
    show({**result, "rows": rows(result)}, as_json=args.json)


if __name__ == "__main__":
    main()
