"""GGUF figures: gemcut against llama.cpp's converter and llama-quantize, and memory at full width.

    python bench/bench_gguf.py [--threads 2] [--json] time LLAMA_CPP_SOURCE LLAMA_CPP_BIN [--layers 1]
    python bench/bench_gguf.py [--threads 2] [--json] memory [--types Q4_K_M …]

time    One layer or more of 26B-A4B at full width, random weights, small vocabulary. For each type: `gemcut gguf` as a
        process of its own against the converter (`--outtype bf16`) and llama-quantize one after the other, the same
        number of threads, in turns; then five types in one run against five runs. Wall and processor seconds, and how
        much of ours was inside the quantisers; bytes on disk at any moment beyond those of the result. Needs 10 GB of
        disk. With two cores about twelve minutes; n = 1 but for the type that takes seconds.
memory  One layer of 26B-A4B and of 31B with all 262,144 words of the vocabulary: peak of resident memory while types
        are written at once. The weights are holes in the file, which changes nothing about memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rows import Line, load_average, row, show
from synthetic import DENSE_31B, Geometry, write

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 262_144
TYPES = {"Q8_0": 0.5, "Q6_K": 0.8, "Q4_K_M": 0.9, "IQ3_M": 1.0}  # and the ratio that is wanted
REPEATS = {"Q8_0": 3}
FIVE = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
FIVE_WANTED = 0.8
MEMORY_WANTED = 2 << 30
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Spent:
    """What a command took. kernel_seconds: inside the quantisers, all threads together; 0 where nobody says.
    extra_bytes: the most that lay on disk at once, beyond the result."""

    wall_seconds: float
    cpu_seconds: float
    kernel_seconds: float = 0.0
    extra_bytes: int = 0


class Disk:
    """The most bytes that were in a folder at once, looked at every LOOK_SECONDS."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self._done = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def now(self) -> int:
        size = 0
        for path in self.folder.rglob("*"):
            try:
                size += path.stat().st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
        return size

    def _look(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self.most = max(self.most, self.now())

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, self.now())


def spent(command: list[str], env: dict[str, str]) -> tuple[Spent, str]:
    """Run a command and measure it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(wall, cpu), done.stdout


def ours(model: Path, types: tuple[str, ...], work: Path, threads: int) -> Spent:
    """`gemcut gguf` into a folder that is removed afterwards."""
    out = work / "out"
    out.mkdir()
    flags = [word for name in types for word in ("-t", name)]
    command = [sys.executable, "-m", "gemcut.cli.main", "gguf", str(model), *flags, "-o", str(out / "gguf")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(out)}
    with Disk(out) as disk:
        found, said = spent([*command, "--threads", str(threads), "--json"], env)
    kernel = json.loads(said)["reports"][0]["kernel_seconds"]
    extra = disk.most - disk.now()
    shutil.rmtree(out)
    return replace(found, kernel_seconds=kernel, extra_bytes=extra)


def theirs(source: Path, binaries: Path, model: Path, kind: str, work: Path, threads: int) -> Spent:
    """Converter, then llama-quantize."""
    wide, small = work / "wide.gguf", work / "small.gguf"
    env = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "LD_LIBRARY_PATH": str(binaries)}
    convert = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(model), "--outtype", "bf16"]
    first, _ = spent([*convert, "--outfile", str(wide)], env)
    second, _ = spent([str(binaries / "llama-quantize"), str(wide), str(small), kind, str(threads)], env)
    extra = wide.stat().st_size
    wide.unlink()
    small.unlink()
    both = (first.wall_seconds + second.wall_seconds, first.cpu_seconds + second.cpu_seconds)
    return Spent(*both, extra_bytes=extra)


def tokenizer(folder: Path, size: int) -> None:
    """The demo's tokenizer, with pairs of its tokens added until there are `size`."""
    demo = ROOT / "demo" / "moe"
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    whole = json.loads((demo / "tokenizer.json").read_text())
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    words = [token for token in vocabulary if token.isalpha()][:800]
    pairs = ((a, b) for a in words for b in words if a + b not in vocabulary)
    while len(vocabulary) < size:
        a, b = next(pairs)
        if a + b not in vocabulary:
            vocabulary[a + b] = len(vocabulary)
            merges.append([a, b])
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))


def timing(args: argparse.Namespace) -> dict[str, Any]:
    """Each type in turns, then five together."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        model = write(work / "model", layers=args.layers, geometry=Geometry(experts=args.experts))
        tokenizer(model, 4096)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for kind, wanted in TYPES.items():
            pairs = []
            for _ in range(REPEATS.get(kind, 1)):
                mine = ours(model, (kind,), work, args.threads)
                other = theirs(args.source, args.binaries, model, kind, work, args.threads)
                pairs.append({"ours": asdict(mine), "theirs": asdict(other)})
                print(f"{kind:8} ours   {mine}\n         theirs {other}", file=sys.stderr, flush=True)
            ratios = sorted(one["ours"]["wall_seconds"] / one["theirs"]["wall_seconds"] for one in pairs)
            found[kind] = {"pairs": pairs, "ratios": ratios, "wanted": wanted}
        alone = [ours(model, (kind,), work, args.threads) for kind in FIVE]
        together = ours(model, FIVE, work, args.threads)
        found["five"] = {"together": asdict(together), "alone": [asdict(one) for one in alone], "wanted": FIVE_WANTED}
    where = {"layers": args.layers, "experts": args.experts, "model_bytes": size, "threads": args.threads}
    return {**where, "types": found, "load": load_average()}


def time_rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    layers = f"{r['layers']} layer" + "s" * (r["layers"] != 1)
    where = f"{layers} of 26B-A4B, {r['experts']} experts, {r['model_bytes'] / 1e9:.2f} GB, {r['threads']} threads"
    out, extra = [], []
    for kind in TYPES:
        one = r["types"][kind]
        mine, other = ([pair[who] for pair in one["pairs"]] for who in ("ours", "theirs"))
        wall = [statistics.median(run["wall_seconds"] for run in runs) for runs in (mine, other)]
        cpu = [statistics.median(run["cpu_seconds"] for run in runs) for runs in (mine, other)]
        kernel = statistics.median(run["kernel_seconds"] for run in mine)
        n, ratios = len(one["pairs"]), one["ratios"]
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if n > 1 else ""
        out.append(
            row(
                f"safetensors → {kind}: wall time of converter + llama-quantize",
                f"≤ {one['wanted']} ×",
                f"{statistics.median(ratios):.2f} ×{spread}; {wall[0]:.1f} s against {wall[1]:.1f} s, processor time "
                f"{cpu[0]:.1f} s against {cpu[1]:.1f} s; {kernel:.1f} s of ours inside the quantisers; "
                f"n = {n}; {where}",
            )
        )
        extra += [(pair["ours"]["extra_bytes"], pair["theirs"]["extra_bytes"]) for pair in one["pairs"]]
    five = r["types"]["five"]
    alone, together = sum(one["wall_seconds"] for one in five["alone"]), five["together"]["wall_seconds"]
    kernels, cpus = (sum(one[what] for one in five["alone"]) for what in ("kernel_seconds", "cpu_seconds"))
    out.append(
        row(
            f"{', '.join(FIVE)} at once: wall time of five runs",
            f"≤ {five['wanted']} ×",
            f"{together / alone:.2f} ×; {together:.1f} s against {alone:.1f} s, processor time "
            f"{five['together']['cpu_seconds']:.1f} s against {cpus:.1f} s; inside the quantisers "
            f"{five['together']['kernel_seconds']:.1f} s against {kernels:.1f} s; n = 1; {where}",
        )
    )
    most = max([five["together"]["extra_bytes"], *(mine for mine, _ in extra)])
    seen = f"the converter's file {max(other for _, other in extra) / 1e9:.2f} GB; looked at every {LOOK_SECONDS:g} s"
    return [*out, row("disk beyond the result, at any moment", "0 bytes", f"{most:,} bytes of journal; {seen}")]


CHILD = """
import sys
from pathlib import Path
from gemcut import exporting, machine
from gemcut.checkpoint import open_checkpoint
words = exporting.GgufWords(tuple(sys.argv[4:]))
exports = exporting.plan_export(open_checkpoint(Path(sys.argv[1])), words)
said = exporting.estimate(exports, Path(sys.argv[2]), int(sys.argv[3]))
exporting.write_export(exports, Path(sys.argv[2]), threads=int(sys.argv[3]))
print(machine.peak_rss_bytes(), said.memory_bytes)
"""


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of whole exports, at full width and with the whole vocabulary."""
    found: dict[str, Any] = {}
    for name, geometry in (("26B-A4B", Geometry()), ("31B", DENSE_31B)):
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            folder = Path(work) / "model"
            write(folder, layers=1, geometry=replace(geometry, vocabulary=VOCABULARY), sparse=True, shard_bytes=8 << 30)
            tokenizer(folder, VOCABULARY)
            words = [str(folder), str(Path(work) / "out"), str(args.threads), *args.types]
            _, said = spent([sys.executable, "-c", CHILD, *words], {**os.environ, "OMP_NUM_THREADS": "1"})
        peak, foretold = map(int, said.split())
        found[name] = {"types": args.types, "peak_bytes": peak, "foretold_bytes": foretold, "threads": args.threads}
    return {"models": found}


def memory_rows(r: dict[str, Any]) -> list[Line]:
    """Lines of docs/bench.md."""
    return [
        row(
            f"`gguf`, peak memory: a layer of {name} at full width, {VOCABULARY:,} words",
            f"≤ {MEMORY_WANTED / 2**30:.0f} GiB",
            f"{one['peak_bytes'] / 2**20:.0f} MiB, foretold {one['foretold_bytes'] / 2**20:.0f}; "
            f"{', '.join(one['types'])} at once, {one['threads']} threads; n = 1",
        )
        for name, one in r["models"].items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the synthetic models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    verbs = parser.add_subparsers(required=True)
    clock = verbs.add_parser("time")
    clock.add_argument("source", type=Path)
    clock.add_argument("binaries", type=Path)
    clock.add_argument("--layers", type=int, default=1)
    clock.add_argument("--experts", type=int, default=128, help="fewer for a quick look: 16 are 347 MB a layer")
    clock.set_defaults(run=timing, rows=time_rows)
    room = verbs.add_parser("memory")
    room.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q3_K_M"])
    room.set_defaults(run=memory, rows=memory_rows)
    args = parser.parse_args()
    found = args.run(args)
    show({**found, "rows": args.rows(found)}, as_json=args.json)


if __name__ == "__main__":
    main()
