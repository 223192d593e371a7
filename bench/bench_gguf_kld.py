"""KL divergence of GGUF files: ours against llama-perplexity's on the same chunks, tokens and scored positions.

    python bench/bench_gguf_kld.py TOOLS [BASE.gguf CANDIDATE.gguf…] [--text FILE] [--chunks 24] [--json]

TOOLS is a folder with a built llama-perplexity. Without files, both demo trunks are compared with what becomes of them
as Q8_0, Q4_K_M and Q2_K. Its rules: the text is cut into runs of `context` tokens that do not
overlap, the first token of each is replaced by BOS, and predictions from position context/2 on are scored. Its base
logits go to disk in 16 bits, which is most of the difference. Token ids are read from that file, so that both score the
very same positions. Give a BASE in F32: with one in BF16 the two builds round activations in other places, which shows
(1 %) where a candidate is as near as Q8_0. Target: mean and median within 1 %, and no logits on disk.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemcut import exporting
from gemcut.checkpoint import open_checkpoint
from gemcut.evaluate.kld import KldSettings, kld
from gemcut.gguf_file.header import GgufFile, open_gguf
from gemcut.stream.corpus import Corpus, Row
from gemcut.stream.corpus_file import read_entries
from rows import Line, row, show
from texts import DEMO, HELD_OUT

BASE, TYPES = "F32", ("Q8_0", "Q4_K_M", "Q2_K")
LIMIT = 0.01
ATTEMPTS = 4
LINES = {
    "mean": r"Mean +KLD: +(\S+) ±",
    "median": r"Median +KLD: +(\S+)",
    "p99": r"99\.0% +KLD: +(\S+)",
    "same_top": r"Same top p: +(\S+) ±",
    "ln_ppl_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\) +: +(\S+) ±",
}


def held_out_text(out: Path) -> Path:
    """Every text of the held-out corpus, without chat markers, a blank line between."""
    parts = []
    for entry in read_entries(HELD_OUT):
        messages = entry.record.messages
        parts.append(entry.record.text or "\n".join(str(m.content) for m in messages or ()))
    out.write_text("\n\n".join(parts))
    return out


def tool(binary: Path, arguments: list[str]) -> str:
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{binary.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def tokens_of(logits: Path, context: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """int32 [chunks, context] from the head of a llama-perplexity logits file."""
    with open(logits, "rb") as f:
        magic, n_ctx, _, chunks = struct.unpack("=8s3i", f.read(20))
        if magic != b"_logits_" or n_ctx != context:
            sys.exit(f"{logits.name}: no logits of context {context}")
        return np.frombuffer(f.read(4 * chunks * n_ctx), np.int32).reshape(chunks, n_ctx)


def corpus_of(tokens: np.ndarray[tuple[int, int], np.dtype[np.int32]], bos: int) -> Corpus:
    """One item per chunk, its first token replaced as the tool does."""
    ids = tokens.astype(np.int64)
    ids[:, 0] = bos
    items = tuple(Row(f"chunk-{i:04d}", "text", row, 1.0) for i, row in enumerate(ids))
    return Corpus(items, "", "", "", "replaced", tokens.shape[1], 0, ("text",))


def theirs(binary: Path, logits: Path, candidate: Path, shared: list[str]) -> dict[str, float]:
    """Its summary. On a loaded machine the tool can end, with code 0, before its log thread has written that."""
    arguments = ["-m", str(candidate), "--kl-divergence-base", str(logits), "--kl-divergence", *shared]
    for _ in range(ATTEMPTS):
        said = tool(binary, arguments)
        matches = {key: re.search(pattern, said) for key, pattern in LINES.items()}
        found = {key: float(match[1]) for key, match in matches.items() if match is not None}
        if len(found) == len(LINES):
            return {**found, "same_top": found["same_top"] / 100}
    sys.exit(f"{binary.name} said no summary:\n{said[-2000:]}")


def measure(tools: Path, base: GgufFile, candidates: list[GgufFile], options: argparse.Namespace) -> dict[str, Any]:
    binary = tools / "llama-perplexity"
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or held_out_text(Path(folder) / "text.txt")
        logits = Path(folder) / "base.logits"
        shared = ["-c", str(options.context), "-t", str(options.threads), "--no-repack"]
        shared += ["--chunks", str(options.chunks)]
        begin = time.perf_counter()
        tool(binary, ["-m", str(base.path), "-f", str(text), "--kl-divergence-base", str(logits), *shared])
        reference = [theirs(binary, logits, one.path, shared) for one in candidates]
        their_seconds = time.perf_counter() - begin
        bos = base.value("tokenizer.ggml.bos_token_id")
        assert isinstance(bos, int)
        corpus = corpus_of(tokens_of(logits, options.context), bos)
        their_bytes = logits.stat().st_size
    begin = time.perf_counter()
    settings = KldSettings(threads=options.threads, context_tokens=options.context // 2)
    ours = kld(base, candidates, corpus, settings)
    our_seconds = time.perf_counter() - begin
    rows = []
    for result, other in zip(ours, reference, strict=True):
        whole = result.rows[-1]
        mine = {key: getattr(whole, key).value for key in LINES}
        rows.append(
            {
                "candidate": result.candidate,
                "tokens": whole.tokens,
                "chunks": result.chunks,
                "ours": mine,
                "theirs": other,
                "mean_difference": mine["mean"] / other["mean"] - 1,
                "median_difference": mine["median"] / other["median"] - 1,
                "interval": [whole.mean.low, whole.mean.high],
            }
        )
    return {
        "context": options.context,
        "rows": rows,
        "our_seconds": our_seconds,
        "their_seconds": their_seconds,
        "their_logits_bytes": their_bytes,
    }


def demo_files(name: str, folder: Path) -> list[Path]:
    """One demo trunk as BASE and TYPES."""
    words = exporting.GgufWords((BASE, *TYPES))
    exports = exporting.plan_export(open_checkpoint(DEMO / name), words)
    exporting.write_export(exports, folder, threads=1)
    return [folder / plan.target.name for one in exports for plan in one.planned]


def lines(found: list[dict[str, Any]]) -> list[Line]:
    """Lines of docs/bench.md."""
    out = [
        row(
            f"{one['candidate']}: mean and median KLD against llama-perplexity's",
            f"within {LIMIT:.0%}",
            f"{one['mean_difference']:+.2%} and {one['median_difference']:+.2%} ({one['ours']['mean']:.6f} and "
            f"{one['ours']['median']:.6f} nats); same top {one['ours']['same_top']:.4f} against "
            f"{one['theirs']['same_top']:.4f}; {one['tokens']:,} tokens, n = {one['chunks']} chunks",
        )
        for each in found
        for one in each["rows"]
    ]
    theirs = " and ".join(f"{each['their_logits_bytes'] / 1e6:.0f} MB" for each in found)
    return [*out, row("logits on disk", "0 bytes", f"0 bytes, files run in step; llama-perplexity's {theirs}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", type=Path)
    parser.add_argument("files", type=Path, nargs="*", help="the base, then candidates")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        made = (demo_files(name, Path(folder) / name) for name in ("dense", "moe"))
        for files in [options.files] if options.files else made:
            base, *candidates = map(open_gguf, files)
            found.append(measure(options.tools, base, candidates, options))
    show({"rows": lines(found), "compared": found}, as_json=options.json)


if __name__ == "__main__":
    main()
