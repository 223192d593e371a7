"""What `auto` importances save: KLD of files with them against files with `plain` ones, type by type.

    python bench/bench_imatrix_auto.py [--json] [--only dense,moe] [--types IQ2_M Q4_K_M …] [--tokens 32768]

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
    gemcut("gguf", model, "-t", kind, "--imatrix", imatrix, "--threads", 1, "-o", out)
    return next(out.glob("*.gguf"))


def files(model: Path, types: list[str], folder: Path) -> tuple[list[Path], list[Path], dict[str, float]]:
    """(plain, auto) file of every type, and the seconds of each with `auto`, its importances included."""
    plain = folder / "plain.gguf"
    gemcut("imatrix", model, "--corpus", CALIBRATION, "-o", plain)
    statistics = plain.with_name(plain.name + ".statistics")
    ours, theirs, seconds = [], [], {}
    for kind in types:
        theirs.append(export(model, kind, plain, folder / f"plain-{kind}"))
        began = time.perf_counter()
        auto = folder / f"auto-{kind}.gguf"
        gemcut("imatrix", statistics, "--model", model, "--variant", "auto", "--for", kind, "-o", auto)
        ours.append(export(model, kind, auto, folder / f"auto-{kind}"))
        seconds[kind] = round(time.perf_counter() - began, 1)
        print(f"{model.name} {kind}: {seconds[kind]} s", file=sys.stderr, flush=True)
    return theirs, ours, seconds


def measure(name: str, types: list[str], tokens: int) -> dict[str, Any]:
    """One trunk."""
    model = DEMO / name
    with tempfile.TemporaryDirectory() as folder:
        plain, auto, seconds = files(model, types, Path(folder))
        opened = [open_gguf(path) for path in (*plain, *auto)]
        found = kld_chunks(open_checkpoint(model), opened, unseen(model, tokens), KldSettings(threads=1))
        n = len(types)
        rows = [
            {
                "type": kind,
                "plain_bytes": opened[i].size_bytes,
                "auto_bytes": opened[n + i].size_bytes,
                "plain_kld": interval(found.mean(i)),
                "auto_kld": interval(found.mean(n + i)),
                "ratio": interval(found.ratio(n + i, i)),
                "seconds": seconds[kind],
            }
            for i, kind in enumerate(types)
        ]
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
    parser.add_argument("--tokens", type=int, default=32768)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: measure(name, asked.types, asked.tokens) for name in asked.only.split(",")}
    show({"rows": list(lines(models)), "models": models}, as_json=asked.json)


if __name__ == "__main__":
    main()
