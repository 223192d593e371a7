"""Compare gemcut's GGUF files with those of llama.cpp's converter and llama-quantize: every type, every byte.

    python bench/compare_gguf.py LLAMA_CPP_SOURCE LLAMA_CPP_BIN [FOLDER …] [--json] [--golden FILE]

For each folder (the demo trunks by default) and each file type of llama-quantize, with and without importances:
converter with `--outtype bf16`, so that nothing is rounded on the way, then llama-quantize; against `gemcut gguf`.
Compared are names, order, types, shapes and bytes of all tensors, every metadata value that both have, and which types
are refused without importances. --golden writes the digests for the test that runs without these tools. The
importances are made up, spread over eight decades, with experts that saw nothing: harder on a quantiser than real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]
from compare_converter import convert  # noqa: E402
from gemcut.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from gemcut.export.layout import layout_of  # noqa: E402
from gemcut.gguf_file import GgufFile, read_gguf  # noqa: E402
from golden_gguf import TYPES, digests, made_imatrix, payload_digest, possible, write_types  # noqa: E402
from rows import row, show  # noqa: E402
from texts import DEMO  # noqa: E402

OURS = ("gemcut.", "quantize.imatrix.file")  # keys that only gemcut writes, or writes without the folder


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quantize(binaries: Path, source: Path, out: Path, kind: str, imatrix: Path | None) -> str:
    """Run llama-quantize on one thread; its last words where it refuses."""
    more = ["--imatrix", str(imatrix)] if imatrix is not None else []
    command = [str(binaries / "llama-quantize"), *more, str(source), str(out), kind, "1"]
    env = {**os.environ, "LD_LIBRARY_PATH": str(binaries)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode == 0:
        return ""
    out.unlink(missing_ok=True)
    return (done.stdout + done.stderr)[-300:]


def differences(ours: GgufFile, theirs: GgufFile) -> list[str]:
    """Every way in which two files are not the same."""
    out = [] if list(ours.tensors) == list(theirs.tensors) else ["names or order of tensors"]
    for name in ours.tensors.keys() & theirs.tensors.keys():
        a, b = ours.tensors[name], theirs.tensors[name]
        if (a.kind, a.shape) != (b.kind, b.shape):
            out.append(f"{name}: {a.kind.name} {a.shape} instead of {b.kind.name} {b.shape}")
        elif ours.read(name).tobytes() != theirs.read(name).tobytes():
            out.append(f"{name}: bytes of {a.kind.name}")
    for key in ours.metadata.keys() | theirs.metadata.keys():
        if not key.startswith(OURS) and ours.metadata.get(key) != theirs.metadata.get(key):
            out.append(f"{key}: {str(ours.value(key))[:80]} instead of {str(theirs.value(key))[:80]}")
    return out


def compare(checkpoint: Checkpoint, source: Path, binaries: Path, types: list[str], work: Path) -> tuple[dict, int]:
    """All types of one checkpoint: digests of what agrees, and the number of differences."""
    layout = layout_of(checkpoint)
    base = work / "bf16.gguf"
    convert(source, checkpoint.path, base)
    imatrix = made_imatrix(layout, work / "imatrix.gguf")
    found: dict[str, dict[str, str]] = {"plain": {}, "imatrix": {}}
    wrong = 0
    for how, given in (("plain", None), ("imatrix", imatrix)):
        able = [name for name in types if name in possible(layout, imatrix=given is not None)]
        began = time.perf_counter()
        files = write_types(checkpoint, able, given, work / how, threads=1)
        tell(f"{checkpoint.name}, {how}: {len(able)} types in {time.perf_counter() - began:.0f} s")
        ours = digests(files)
        for name in types:
            reference = work / "reference.gguf"
            refused = quantize(binaries, base, reference, name, given)
            if refused or name not in able:
                agreed = bool(refused) and name not in able
                tell(f"  {name:10} {how:8} {'both refuse' if agreed else f'REFUSED BY ONE: {refused}'}")
                wrong += not agreed
                continue
            theirs = read_gguf(reference)
            list_ = differences(read_gguf(files[name]), theirs)
            assert bool(list_) or payload_digest(theirs) == ours[name]
            tell(f"  {name:10} {how:8} {'equal' if not list_ else 'DIFFERS: ' + '; '.join(list_[:3])}")
            wrong += bool(list_)
            found[how][name] = ours[name]
            reference.unlink()
            files[name].unlink()
    return found, wrong


def main() -> int:
    """Tell a line per type on stderr; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("binaries", type=Path)
    parser.add_argument("folders", type=Path, nargs="*", default=[DEMO / "dense", DEMO / "moe"])
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--golden", type=Path)
    args = parser.parse_args()
    results, rows, wrong = {}, [], 0
    for folder in args.folders:
        with tempfile.TemporaryDirectory() as work:
            found, bad = compare(open_checkpoint(folder), args.source, args.binaries, args.types, Path(work))
        results[folder.name] = found
        wrong += bad
        files = f"of {len(found['plain'])} without and {len(found['imatrix'])} with importances"
        rows.append(row(f"{folder.name}: files that differ from converter + llama-quantize", "0", f"{bad} {files}"))
    show({"rows": rows, "digests": results}, as_json=args.json)
    if args.golden and not wrong:
        args.golden.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
