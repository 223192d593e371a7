"""Importances out of an observation against llama-imatrix on the same tokens, and files both ways.

    python bench/bench_imatrix.py TOOLS [--json] [--characters 120000]

TOOLS: folder with llama-imatrix and llama-quantize. Both demo checkpoints are written as BF16 GGUF, one text goes
through llama-imatrix in chunks of 512 tokens (BOS in the place of each first one), and the same token ids through
observe. Compared per tensor: ‖ours − theirs‖₂ / ‖theirs‖₂ of all importances, and the counts. Then llama-quantize takes
our file, and its own tool's statistics read it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gemcut import exporting, models
from gemcut.checkpoint import Checkpoint
from gemcut.export.imatrix import Imatrix, fit, from_statistics, read_imatrix, write_imatrix
from gemcut.export.layout import layout_of
from gemcut.observe.run import observe
from gemcut.observe.settings import ObserveSettings
from gemcut.stream.corpus import Corpus, Row
from gemcut.stream.rendering import open_tokenizer, render_text
from rows import Line, row, show
from texts import CALIBRATION

CHUNK = 512
LIMIT = 0.03
DTYPES = ("bfloat16", "float32")


def text_of(characters: int) -> str:
    """The plain items of the calibration corpus, one after the other."""
    records = [json.loads(line) for line in CALIBRATION.read_text().splitlines()]
    return "\n\n".join(record["text"] for record in records if "text" in record)[:characters]


def chunks(checkpoint: Checkpoint, text: str) -> Corpus:
    """What llama-imatrix makes of a text: whole chunks, the first token of each replaced."""
    tokenizer = open_tokenizer(checkpoint.path)
    ids = np.asarray(render_text(tokenizer, text, "text").ids, np.int64)
    items = []
    for i in range(len(ids) // CHUNK):
        chunk = ids[i * CHUNK : (i + 1) * CHUNK].copy()
        chunk[0] = tokenizer.bos_id
        items.append(Row(f"chunk-{i}", "text", chunk, 1.0))
    return Corpus(tuple(items), "0" * 64, tokenizer.template_hash, tokenizer.hash, "text: added", CHUNK, 0, ("text",))


def run(*command: object) -> str:
    """Standard error and output of a tool; its failure ends the bench."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def difference(ours: Imatrix, theirs: Imatrix) -> dict[str, object]:
    """Per tensor and per expert, relative L2 of importances; and of counts."""
    tensors, units, counts = {}, [], 0.0
    for name, entry in ours.entries.items():
        a, b = (np.stack([one.importance(name, u) for u in range(len(entry.counts))]) for one in (ours, theirs))
        tensors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        units += (np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).tolist()
        seen = theirs.entries[name].counts
        counts = max(counts, float(np.abs(entry.counts - seen).max() / seen.max()))
    worst = max(tensors, key=tensors.__getitem__)
    return {
        "tensors": len(tensors),
        "median": float(np.median(list(tensors.values()))),
        "worst": tensors[worst],
        "worst_tensor": worst,
        "worst_unit": max(units),
        "units": len(units),
        "counts": counts,
    }


def compare(name: str, tools: Path, folder: Path, characters: int) -> dict[str, Any]:
    """One demo checkpoint."""
    checkpoint = models.open_model(name)
    exports = exporting.plan_export(checkpoint, exporting.GgufWords(("BF16",)))
    exporting.write_export(exports, folder, threads=1)
    model = next(folder.glob("*.gguf"))
    text = text_of(characters)
    (folder / "text.txt").write_text(text)
    reference = folder / "reference.imatrix"
    command = ("-m", model, "-f", folder / "text.txt", "-o", reference, "-c", CHUNK, "--no-ppl", "-t", 1)
    run(tools / "llama-imatrix", *command)
    corpus = chunks(checkpoint, text)
    layout = layout_of(checkpoint)
    theirs = read_imatrix(reference)
    routers = {tensor.name for tensor in layout.tensors if tensor.keep_f32}
    quantised = {key: entry for key, entry in theirs.entries.items() if key not in routers}
    fitted = fit(Imatrix(quantised, theirs.datasets, theirs.chunks, theirs.chunk_size), layout)
    found: dict[str, Any] = {"model": name, "tokens": corpus.tokens}
    for dtype in DTYPES:
        statistics = observe(checkpoint, corpus, folder / dtype, settings=ObserveSettings(dtype=dtype))
        ours = from_statistics(statistics, layout, prior=0)
        found[dtype] = difference(ours, fitted)
    found["only_theirs"] = sorted({name.split(".", 2)[2] for name in routers & theirs.entries.keys()})
    write_imatrix(folder / "ours.gguf", ours)
    said = run(tools / "llama-quantize", "--imatrix", folder / "ours.gguf", model, folder / "small.gguf", "IQ2_M", 1)
    found["quantise_found_all"] = "did not find weights" not in said.replace("did not find weights for token_embd", "")
    shown = run(tools / "llama-imatrix", "-m", model, "--in-file", folder / "ours.gguf", "--show-statistics")
    found["statistics_tensors"] = shown.count("\tffn_") + shown.count("\tattn_")
    return found


def rows(results: list[dict[str, Any]]) -> list[Line]:
    """Lines of docs/bench.md."""
    out = []
    for one in results:
        for dtype in DTYPES:
            d = one[dtype]
            out.append(
                row(
                    f"{one['model']}, {dtype} states: importances of the worst tensor against llama-imatrix's",
                    f"within {LIMIT:.0%}",
                    f"{d['worst']:.2%} (`{d['worst_tensor']}`; median of {d['tensors']} tensors {d['median']:.2%}, "
                    f"worst of {d['units']} units {d['worst_unit']:.2%}); counts within {d['counts']:.2%}; "
                    f"{one['tokens']:,} tokens",
                )
            )
        found = "all tensors found" if one["quantise_found_all"] else "TENSORS MISSING"
        out.append(row(f"{one['model']}: llama-quantize with our file", "finds all", found))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", type=Path)
    parser.add_argument("--characters", type=int, default=120_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = []
    for name in ("demo:dense", "demo:moe"):
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(name, args.tools, Path(folder), args.characters))
    within = all(one[dtype]["worst"] <= LIMIT for one in results for dtype in DTYPES)
    show({"rows": rows(results), "limit": LIMIT, "within_limit": within, "results": results}, as_json=args.json)
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
