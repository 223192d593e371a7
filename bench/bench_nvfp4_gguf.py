"""NVFP4 checkpoints as GGUF files: held against llama.cpp's converter, and against the folders that they come from.

    python bench/bench_nvfp4_gguf.py bytes LLAMA_CPP_SOURCE [--json]
    python bench/bench_nvfp4_gguf.py kld [--json] [--only dense,moe] [--tokens 32768]

bytes: demo trunks of both schemes through the converter and through gemcut: names, types, shapes and bytes of all
tensors, and the keys that both write. The converter takes a mixture in modelopt's layout only, and no rows but of a
multiple of 64; so the mixture's dense down-projections (160 wide) stay in BF16 here.
kld: all matrices in NVFP4A16; the folder is streamed in float32, its file runs in llama.cpp, whose kernels round
activations to 8 bits; both against the trunk, and the file against the folder. Held-out items that nobody looked at,
95 % intervals from a bootstrap over items.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compare_converter import convert as run_converter
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.evaluate.kld import KldSettings, kld_chunks
from gemcut.export.nvfp4.convert import convert, plan_conversion
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.exporting import GgufWords, plan_export, write_export
from gemcut.gguf_file import GgufFile, open_gguf
from gemcut.observe.run import observe
from gemcut.stream.corpus import load_corpus
from rows import Line, interval, row, show, spell
from texts import CALIBRATION, DEMO, unseen

OURS = ("gemcut.", "general.tensor_extra.")  # keys that the converter does not write, or not of every layout
PARTS: Mapping[str, tuple[Any, tuple[str, ...]]] = {"dense": ("all", ()), "moe": ("mlp+experts", (r"mlp\.down_proj",))}


def as_gguf(folder: Checkpoint, out: Path) -> GgufFile:
    planned = plan_export(folder, GgufWords(("NVFP4",)))
    write_export(planned, out, threads=1)
    return open_gguf(out / planned[0].planned[0].target.name)


def differences(ours: GgufFile, theirs: GgufFile) -> list[str]:
    """Every way in which two files are not the same, but for the order of their tensors."""
    out = sorted(ours.tensors.keys() ^ theirs.tensors.keys())
    for name in ours.tensors.keys() & theirs.tensors.keys():
        a, b = ours.tensors[name], theirs.tensors[name]
        if (a.kind, a.shape) != (b.kind, b.shape) or ours.read(name).tobytes() != theirs.read(name).tobytes():
            out.append(name)
    keys = ours.metadata.keys() | theirs.metadata.keys()
    return out + [
        key for key in keys if not key.startswith(OURS) and ours.metadata.get(key) != theirs.metadata.get(key)
    ]


def compare(source: Path) -> dict[str, dict[str, Any]]:
    """Checkpoint → tensors of its file, and what differs."""
    found: dict[str, dict[str, Any]] = {}
    for name, (targets, ignore) in PARTS.items():
        base = open_checkpoint(DEMO / name)
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            stats = observe(base, load_corpus(CALIBRATION, base.path, max_tokens=16384), work / "stats")
            folders = []
            for scheme in ("NVFP4A16", "NVFP4"):
                settings = Settings(scheme, targets, ignore=ignore, kv="bound", max_borrowed=1)
                write_nvfp4(prepare(base, settings, stats), work / scheme)
                folder = open_checkpoint(work / scheme)
                convert(plan_conversion(folder, "modelopt"), work / f"{scheme}-modelopt")
                folders += [folder] if name == "dense" else []
                folders.append(open_checkpoint(work / f"{scheme}-modelopt"))
            for folder in folders:
                run_converter(source, folder.path, theirs := work / "theirs.gguf")
                ours = as_gguf(folder, work / "ours")
                wrong = differences(ours, open_gguf(theirs))
                found[f"{name}-{folder.name}"] = {"tensors": len(ours.tensors), "differ": wrong}
                print(f"{name} {folder.name}: {len(wrong)} differences", file=sys.stderr, flush=True)
    return found


def measure(name: str, tokens: int) -> dict[str, Any]:
    """One trunk: folder and file from the trunk, and the file from the folder."""
    base = open_checkpoint(DEMO / name)
    corpus, settings = unseen(base.path, tokens), KldSettings(threads=1)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_nvfp4(prepare(base, Settings("NVFP4A16", "all")), work / "folder")
        folder = open_checkpoint(work / "folder")
        file = as_gguf(folder, work / "file")
        both = kld_chunks(base, [folder, file], corpus, settings)
        apart = kld_chunks(folder, [file], corpus, settings)
        return {
            "tokens": int(both.tokens.sum()),
            "chunks": len(both.tokens),
            "size_bytes": file.size_bytes,
            "folder": interval(both.mean(0)),
            "file": interval(both.mean(1)),
            "ratio": interval(both.ratio(1, 0)),
            "apart": interval(apart.mean(0)),
        }


def lines(found: Mapping[str, Any]) -> Iterator[Line]:
    """Lines of `kld`."""
    for name, one in found.items():
        yield row(
            f"demo/{name}, all matrices in NVFP4A16: KLD of the GGUF file from BF16 as a share of the folder's",
            "0.95 … 1.05",
            f"{spell(one['ratio'])}; {spell(one['file'], '.5f')} against {spell(one['folder'], '.5f')} nats, and "
            f"{spell(one['apart'], '.6f')} from file to folder; n = {one['chunks']} items, {one['tokens']:,} tokens",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bytes", "kld"))
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="dense,moe")
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if options.what == "kld":
        trunks = {name: measure(name, options.tokens) for name in options.only.split(",")}
        show({"rows": list(lines(trunks)), "trunks": trunks}, as_json=options.json)
        return
    if options.source is None:
        parser.error("bytes wants llama.cpp's source")
    files = compare(options.source)
    wrong, tensors = (
        sum(count(one[key]) for one in files.values()) for key, count in (("differ", len), ("tensors", int))
    )
    told = f"{wrong}, of {tensors:,} tensors and all shared keys in {len(files)} files: {', '.join(files)}"
    what = "NVFP4 checkpoints as GGUF: tensors (bytes) and keys that differ from the converter's"
    show({"rows": [row(what, "0", told)], "files": files}, as_json=options.json)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
