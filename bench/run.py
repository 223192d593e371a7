"""The performance figures, one bench after another on this machine, as the tables of docs/bench.md.

    python bench/run.py [--only cut,observe] [--reference DIR] [--wide DIR] [--rival DIR]
    python bench/run.py --keep imatrix-auto FILE   keep what that bench printed with --json
    python bench/run.py --page       only write the page anew
    python bench/run.py --check      exit 1 if the page is not what the records say

Each bench is a process of its own that prints JSON; nothing else should run meanwhile. Ratios are formed inside one
bench, never across machines. Its answer is kept in bench/records, beside machine and date, and the page is made of all
the records: what is not run again stays. `--only` takes names of benches or of chapters.

Benches that hold gemcut against llama.cpp's tools need them: `--reference` names a folder with its source in `src/` and
the tools built from it in `build/bin/`. `--wide` names the trunk that `wide_experts.py` trains, `--rival` a virtual
environment with llm-compressor. What needs a folder that is not named is skipped, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
PAGE = HERE.parent / "docs" / "bench.md"
REFERENCE, WIDE, RIVAL = "{reference}", "{wide}", "{rival}"
SOURCE, TOOLS = f"{REFERENCE}/src", f"{REFERENCE}/build/bin"


@dataclass(frozen=True, slots=True)
class Bench:
    """A script of this folder with its words, and what the reader should know of its table."""

    command: tuple[str, ...]
    about: str = ""

    def words(self, folders: Mapping[str, str]) -> list[str]:
        """The command with folders in the place of their names."""
        out = list(self.command)
        for name, folder in folders.items():
            out = [word.replace(name, folder) for word in out]
        return out

    def lacks(self, folders: Mapping[str, str]) -> list[str]:
        """Names of folders that it needs besides these."""
        needed = (name for name in (REFERENCE, WIDE, RIVAL) if any(name in word for word in self.command))
        return [name.strip("{}") for name in needed if name not in folders]


@dataclass(frozen=True, slots=True)
class Chapter:
    """A heading of the page.   about: a paragraph under it."""

    title: str
    about: str
    benches: dict[str, Bench]


_TRUNKS = "The trained demo trunks, on held-out text that nobody looked at; intervals are 95 %, from a bootstrap over"

# A new bench is a line here; it prints {"rows": …} with `--json` (see rows.py).
CHAPTERS = {
    "experts": Chapter(
        "Observe, score, cut",
        "Synthetic checkpoints have the layer geometry of 26B-A4B (hidden 2816, 128 experts of width 704, dense 2112, "
        "16 heads, 8 and 2 KV heads) and fewer layers.",
        {
            "cut": Bench(("bench_cut.py",)),
            "observe": Bench(("bench_observe.py",)),
            "score": Bench(("bench_score.py",)),
            "start": Bench(("bench_start.py",)),
            "mask": Bench(("bench_mask.py",)),
            "memory": Bench(("bench_memory.py",)),
        },
    ),
    "attention": Chapter(
        "Cuts of heads",
        "Measured on the trained demo dense checkpoint; the memory of a solve at the width of 31B.",
        {
            "heads": Bench(("bench_heads.py", "--only", "heads")),
            "solve": Bench(("bench_heads.py", "--only", "solve")),
        },
    ),
    "gguf": Chapter(
        "GGUF",
        "The reference is llama.cpp's own converter and tools, built from source for AVX2.",
        {
            "gguf-time": Bench(
                ("bench_gguf.py", "time", SOURCE, TOOLS),
                "Both sides quantise with the same kernels; what can differ is everything around them.",
            ),
            "gguf-memory": Bench(("bench_gguf.py", "memory")),
            "quantise": Bench(("bench_quantise.py",)),
            "gguf-bytes": Bench(
                ("compare_gguf.py", SOURCE, TOOLS),
                "Every file type of llama-quantize: names, order, types, shapes and bytes of all tensors; metadata.",
            ),
            "gguf-types": Bench(("bench_gguf_types.py", REFERENCE), "Demo trunks, and headers of real geometries."),
            "gguf-keys": Bench(("compare_converter.py", SOURCE)),
            "gguf-kld": Bench(("bench_gguf_kld.py", TOOLS), "Against the trunk itself in F32, on the same chunks."),
            "imatrix": Bench(("bench_imatrix.py", TOOLS), "From one text, the same tokens on both sides."),
            "imatrix-auto": Bench(("bench_imatrix_auto.py",), f"{_TRUNKS} items."),
            "imatrix-auto-all": Bench(
                ("bench_imatrix_auto.py", "--types", "IQ2_M", "--tokens", "60000"),
                "The same files, on all the text that nobody looked at.",
            ),
            "mix": Bench(("bench_gguf_mix.py",), f"{_TRUNKS} chunks."),
            "padding": Bench(("bench_padding.py", "--model", WIDE)),
            "gguf-nvfp4": Bench(("bench_nvfp4_gguf.py", "bytes", SOURCE)),
            "gguf-nvfp4-kld": Bench(("bench_nvfp4_gguf.py", "kld"), f"{_TRUNKS} items."),
        },
    ),
    "compressed": Chapter(
        "NVFP4 checkpoints",
        "Four-bit weights (NVFP4A16), or four-bit activations too (NVFP4).",
        {
            "nvfp4-speed": Bench(
                ("bench_nvfp4.py", "speed"),
                "The whole verb, its start, reading, hashing and fsync included; random weights at full width.",
            ),
            "nvfp4-rival": Bench(
                ("bench_nvfp4.py", "rival", f"{RIVAL}/bin/python"),
                f"llm-compressor with its defaults, from the same samples. {_TRUNKS} items or matrices.",
            ),
            "nvfp4-kld": Bench(
                ("bench_nvfp4_kld.py", "scales"),
                f"Block scales `weighted` and activations by `max` are the defaults. {_TRUNKS} items.",
            ),
            "nvfp4-cache": Bench(("bench_nvfp4_kld.py", "cache"), f"{_TRUNKS} items."),
        },
    ),
}
BENCHES = {name: bench for chapter in CHAPTERS.values() for name, bench in chapter.benches.items()}


def named(words: str) -> list[str]:
    """Benches by name or chapter, each once, in the order of the page."""
    asked = set(words.split(","))
    unknown = asked - BENCHES.keys() - CHAPTERS.keys()
    if unknown:
        sys.exit(f"no such bench: {', '.join(sorted(unknown))}; there are {', '.join([*CHAPTERS, *BENCHES])}")
    return [name for key, one in CHAPTERS.items() for name in one.benches if {name, key} & asked]


def processor() -> str:
    """The processor's name, without the machine's."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def this_machine() -> str:
    """What a figure depends on; no host."""
    from gemcut import machine

    stack = machine.stack()
    return (
        f"{processor()}, {machine.cores()} cores, {machine.total_bytes() / 2**30:.2f} GiB of memory, no GPU; "
        f"torch {stack['torch']}, transformers {stack['transformers']}"
    )


def run(name: str, folders: Mapping[str, str]) -> bool:
    """Run one bench and keep its answer. False where there is none; its old record stays."""
    bench = BENCHES[name]
    if lacks := bench.lacks(folders):
        print(f"{name}: skipped, it needs --{' --'.join(lacks)}", file=sys.stderr)
        return True
    script, *words = bench.words(folders)
    print(f"== {name}: {' '.join(bench.command)}", file=sys.stderr, flush=True)
    began, load = time.perf_counter(), os.getloadavg()[0]
    command = [sys.executable, str(HERE / script), "--json", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        print(f"{name}: no answer (exit {done.returncode})", file=sys.stderr)
        return False
    seconds = time.perf_counter() - began
    keep(name, answer, seconds=round(seconds), load_before=round(load, 1))
    print(f"== {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return True


def keep(name: str, answer: dict[str, Any], **facts: float) -> None:
    """Write a record."""
    RECORDS.mkdir(exist_ok=True)
    record = {"date": time.strftime("%Y-%m-%d"), "machine": this_machine(), **facts, "answer": answer}
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def section(name: str, record: dict[str, Any], machine: str) -> Iterator[str]:
    """One bench on the page. machine: the page's own, which need not be said again."""
    bench = BENCHES[name]
    words = " ".join(bench.words({REFERENCE: "REFERENCE", WIDE: "WIDE", RIVAL: "RIVAL"}))
    said = [bench.about] if bench.about else []
    said += [f"`bench/{words}`, {record['date']}" + (f", {record['machine']}" * (record["machine"] != machine)) + "."]
    yield from ("", " ".join(said), "", "| what | target | measured |", "|---|---|---|")
    for one in record["answer"]["rows"]:
        yield f"| {one['what']} | {one['target']} | {one['measured']} |"


def page() -> str:
    """docs/bench.md, from the records."""
    records = {
        name: json.loads((RECORDS / f"{name}.json").read_text())
        for name in BENCHES
        if (RECORDS / f"{name}.json").is_file()
    }
    machines = [one["machine"] for one in records.values()]
    usual = max(machines, key=machines.count)
    lines = [
        "<!-- written by bench/run.py: run it again instead of editing -->",
        "",
        "# Measured figures",
        "",
        f"{usual}, unless a table says otherwise. Every ratio is formed within one run.",
        "",
        "```sh",
        "make bench                  # all of it but what needs llama.cpp",
        "make bench REFERENCE=DIR    # DIR holds llama.cpp in src/ and its tools in build/bin/",
        "python bench/run.py --only imatrix,gguf-time --reference DIR   # the rest of the page stays",
        "```",
    ]
    for chapter in CHAPTERS.values():
        here = [name for name in chapter.benches if name in records]
        if here:
            lines += ["", f"## {chapter.title}", "", chapter.about]
        for name in here:
            lines += section(name, records[name], usual)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES))
    parser.add_argument("--reference", type=Path, help="folder with llama.cpp: src/ and build/bin/")
    parser.add_argument("--wide", type=Path, help="folder of a trunk with experts 704 wide")
    parser.add_argument("--rival", type=Path, help="folder of a virtual environment with llm-compressor")
    parser.add_argument("--keep", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        if page() != PAGE.read_text():
            print("docs/bench.md is not what bench/records say: run bench/run.py --page", file=sys.stderr)
            return 1
        return 0
    answered = True
    if args.keep:
        name, file = args.keep
        if name not in BENCHES:
            sys.exit(f"no such bench: {name}; there are {', '.join(BENCHES)}")
        keep(name, json.loads(Path(file).read_text()))
    elif not args.page:
        given = {REFERENCE: args.reference, WIDE: args.wide, RIVAL: args.rival}
        folders = {name: str(folder.resolve()) for name, folder in given.items() if folder is not None}
        for name in named(args.only):
            answered &= run(name, folders)
            PAGE.write_text(page())  # what is measured stays measured, whatever comes next
        if os.getloadavg()[0] > (os.cpu_count() or 1) + 1:
            print("the machine was loaded: keep no seconds of this", file=sys.stderr)
    PAGE.write_text(page())
    return 0 if answered else 1


if __name__ == "__main__":
    sys.exit(main())
