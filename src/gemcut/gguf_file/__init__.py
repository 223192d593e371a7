"""GGUF files in and out: a reader that believes no number, a writer whose header comes last. Payloads stay bytes."""

from __future__ import annotations

from gemcut.gguf_file.header import GgufFile, GgufRef, open_gguf, read_gguf
from gemcut.gguf_file.write import GgufWriter, Layout, gguf_writer, lay_out, lay_out_split

__all__ = [
    "GgufFile",
    "GgufRef",
    "GgufWriter",
    "Layout",
    "gguf_writer",
    "lay_out",
    "lay_out_split",
    "open_gguf",
    "read_gguf",
]
