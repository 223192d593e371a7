"""GGUF figures: gemcut against llama.cpp's converter and llama-quantize, and memory at full width.

    python bench/bench_gguf.py time LLAMA_CPP_SOURCE LLAMA_CPP_BIN [--layers 1] [--threads 2] [--json FILE]
    python bench/bench_gguf.py memory [--types Q4_K_M …] [--json FILE]

time    One layer or more of 26B-A4B at full width, random weights, small vocabulary. For each type: `gemcut gguf` as a
        process of its own against the converter (`--outtype bf16`) and llama-quantize one after the other, the same
        number of threads, in turns; then five types in one run against five runs. Wall and processor seconds, and how
        much of ours was inside the quantisers. Needs 10 GB of disk.
memory  One layer of 26B-A4B and of 31B with all 262,144 words of the vocabulary: peak of resident memory while types
        are written at once. The weights are holes in the file, which changes nothing about memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from synthetic import DENSE_31B, Geometry, write

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 262_144
TYPES = {"Q8_0": 0.5, "Q6_K": 0.8, "Q4_K_M": 0.9, "IQ3_M": 1.0}  # and the ratio that is wanted
FIVE = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")
FIVE_WANTED = 0.8
MEMORY_WANTED = 2 << 30


@dataclass(frozen=True, slots=True)
class Spent:
    """What a command took. kernel_seconds: inside the quantisers, all threads together; 0 where nobody says."""

    wall_seconds: float
    cpu_seconds: float
    kernel_seconds: float = 0.0


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


def ours(model: Path, types: tuple[str, ...], out: Path, threads: int) -> Spent:
    """`gemcut gguf` into a folder that is emptied afterwards."""
    flags = [word for name in types for word in ("-t", name)]
    command = [sys.executable, "-m", "gemcut.cli.main", "gguf", str(model), *flags, "-o", str(out)]
    found, said = spent([*command, "--threads", str(threads), "--json"], {**os.environ, "OMP_NUM_THREADS": "1"})
    kernel = json.loads(said)["reports"][0]["kernel_seconds"]
    for path in out.iterdir():
        path.unlink()
    return replace(found, kernel_seconds=kernel)


def theirs(source: Path, binaries: Path, model: Path, kind: str, work: Path, threads: int) -> Spent:
    """Converter, then llama-quantize."""
    wide, small = work / "wide.gguf", work / "small.gguf"
    env = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "LD_LIBRARY_PATH": str(binaries)}
    convert = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(model), "--outtype", "bf16"]
    first, _ = spent([*convert, "--outfile", str(wide)], env)
    second, _ = spent([str(binaries / "llama-quantize"), str(wide), str(small), kind, str(threads)], env)
    wide.unlink()
    small.unlink()
    return Spent(first.wall_seconds + second.wall_seconds, first.cpu_seconds + second.cpu_seconds)


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


def timing(args: argparse.Namespace) -> dict[str, object]:
    """Each type in turns, then five together."""
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        model = write(work / "model", layers=args.layers, geometry=Geometry(experts=args.experts))
        tokenizer(model, 4096)
        alone = 0.0
        for kind, wanted in TYPES.items():
            mine = ours(model, (kind,), work / "out", args.threads)
            other = theirs(args.source, args.binaries, model, kind, work, args.threads)
            ratio = mine.wall_seconds / other.wall_seconds
            rows[kind] = {"ours": asdict(mine), "theirs": asdict(other), "ratio": ratio, "wanted": wanted}
            print(
                f"{kind:8} ours {mine}\n         theirs {other}\n         ratio {ratio:.2f}, wanted {wanted}",
                flush=True,
            )
        for kind in FIVE:
            alone += ours(model, (kind,), work / "out", args.threads).wall_seconds
        together = ours(model, FIVE, work / "out", args.threads).wall_seconds
        rows["five"] = {"together": together, "alone": alone, "ratio": together / alone, "wanted": FIVE_WANTED}
        print(f"five at once {together:.1f} s, one by one {alone:.1f} s, ratio {together / alone:.2f}")
    return rows


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


def memory(args: argparse.Namespace) -> dict[str, object]:
    """Peak memory of whole exports, at full width and with the whole vocabulary."""
    rows: dict[str, object] = {}
    for name, geometry in (("26B-A4B", Geometry()), ("31B", DENSE_31B)):
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            folder = Path(work) / "model"
            write(folder, layers=1, geometry=replace(geometry, vocabulary=VOCABULARY), sparse=True, shard_bytes=8 << 30)
            tokenizer(folder, VOCABULARY)
            command = [
                sys.executable,
                "-c",
                CHILD,
                str(folder),
                str(Path(work) / "out"),
                str(args.threads),
                *args.types,
            ]
            _, said = spent(command, {**os.environ, "OMP_NUM_THREADS": "1"})
        peak, foretold = map(int, said.split())
        rows[name] = {"types": args.types, "peak_bytes": peak, "foretold_bytes": foretold, "wanted": MEMORY_WANTED}
        print(
            f"{name}: {peak / 2**20:.0f} MiB, foretold {foretold / 2**20:.0f}, for {', '.join(args.types)}", flush=True
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the synthetic models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    verbs = parser.add_subparsers(required=True)
    clock = verbs.add_parser("time")
    clock.add_argument("source", type=Path)
    clock.add_argument("binaries", type=Path)
    clock.add_argument("--layers", type=int, default=1)
    clock.add_argument("--experts", type=int, default=128, help="fewer for a quick look: 16 are 347 MB a layer")
    clock.set_defaults(run=timing)
    room = verbs.add_parser("memory")
    room.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q3_K_M"])
    room.set_defaults(run=memory)
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
