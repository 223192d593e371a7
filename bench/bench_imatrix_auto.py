"""What `auto` importances save: KLD of files with them against files with `plain` ones, type by type.

    python bench/bench_imatrix_auto.py [--json] [--only dense,moe] [--types IQ2_M Q4_K_M …] [--tokens 16384]
                                         [--work DIR]

Everything as a user does it: `gemcut imatrix MODEL --corpus`, `gemcut imatrix STATISTICS --variant auto --for TYPE`,
`gemcut gguf -t TYPE --imatrix`, roundings picked as by default. All files of a trunk are compared with it in one pass,
on held-out items that nobody looked at; ratios are paired by item, with 95 % intervals from a bootstrap over items.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gemcut.checkpoint import open_checkpoint
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.gguf_file import open_gguf
from rows import Line, interval, row, show, spell
from texts import CALIBRATION, DEMO, unseen

TYPES = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K",
)  # fmt: skip
TARGET = {"IQ2_M": 0.95}
STARVED = 5  # exit code of an importance matrix that is written, with too many starved experts


def gemcut(*words: object) -> None:
    """One call of the command line, one thread."""
    command = [sys.executable, "-m", "gemcut.cli.main", *map(str, words), "-q"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode not in (0, STARVED if words[0] == "imatrix" else 0):
        raise SystemExit(f"gemcut {words[0]} failed:\n{done.stderr[-2000:]}")


def export(model: Path, kind: str, imatrix: Path, out: Path) -> Path:
    """One file."""
    gemcut("gguf", model, "-t", kind, "--imatrix", imatrix, "--threads", 1, "--force", "-o", out)
    return next(out.glob("*.gguf"))


def pair(model: Path, kind: str, plain: Path, folder: Path) -> tuple[Path, Path]:
    """The files of one type, with `plain` and with `auto`; those that are there already are not made again."""
    auto = folder / f"auto-{kind}.gguf"
    made = [folder / f"plain-{kind}", folder / f"auto-{kind}"]
    if not all(any(one.glob("*.gguf")) for one in made):
        began = time.perf_counter()
        statistics = plain.with_name(plain.name + ".statistics")
        words = ("--model", model, "--variant", "auto", "--for", kind)
        gemcut("imatrix", statistics, *words, "--force", "-o", auto)
        for imatrix, out in zip((plain, auto), made, strict=True):
            export(model, kind, imatrix, out)
        print(f"{model.name} {kind}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return next(made[0].glob("*.gguf")), next(made[1].glob("*.gguf"))


def measure(name: str, types: list[str], tokens: int, folder: Path) -> dict[str, Any]:
    """One trunk."""
    model, plain = DEMO / name, folder / "plain.gguf"
    if not plain.exists():
        gemcut("imatrix", model, "--corpus", CALIBRATION, "-o", plain)
    pairs = [pair(model, kind, plain, folder) for kind in types]
    opened = [open_gguf(path) for both in pairs for path in both]
    found = kld_chunks(open_checkpoint(model), opened, unseen(model, tokens), KldSettings(threads=1))
    rows = [
        {
            "type": kind,
            "plain_bytes": opened[2 * i].size_bytes,
            "auto_bytes": opened[2 * i + 1].size_bytes,
            "plain_kld": interval(found.mean(2 * i)),
            "auto_kld": interval(found.mean(2 * i + 1)),
            "ratio": interval(found.ratio(2 * i + 1, 2 * i)),
        }
        for i, kind in enumerate(types)
    ]
    print(f"{name} done", file=sys.stderr, flush=True)
    return {"tokens": int(found.tokens.sum()), "chunks": len(found.tokens), "types": rows}


def lines(found: Mapping[str, Any]) -> Iterator[Line]:
    """Lines for the page of figures."""
    for name, one in found.items():
        for each in one["types"]:
            target = TARGET.get(each["type"], 1)
            klds = f"KLD {each['auto_kld']['value']:.5f} against {each['plain_kld']['value']:.5f}"
            yield row(
                f"demo/{name}, {each['type']}: KLD with `auto` as a share of that with `plain`",
                f"≤ {target}",
                f"{spell(each['ratio'])}; {klds}; n = {one['chunks']} items, {one['tokens']:,} tokens",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="dense,moe")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--work", type=Path, help="keep files there, and take what is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.only.split(","):
            folder = (asked.work or Path(scratch)) / name
            folder.mkdir(parents=True, exist_ok=True)
            models[name] = measure(name, asked.types, asked.tokens, folder)
    show({"rows": list(lines(models)), "models": models}, as_json=asked.json)


if __name__ == "__main__":
    main()
