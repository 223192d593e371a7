"""Which GGUF file it is, without reading all of it."""

from __future__ import annotations

import hashlib

from gemcut.gguf_file.header import GgufFile
from gemcut.store import fingerprint

_SAMPLE_BYTES = 4096


def gguf_fingerprint(file: GgufFile) -> str:
    """sha256 over the metadata, every tensor's type, shape and size, and 4 KiB from the middle of each.

    An identity, not a proof. Name, place and split of the file do not enter.
    """
    digest = hashlib.sha256()
    for key in sorted(file.metadata):
        value = file.metadata[key]
        digest.update(f"{key}\x00{value.kind}\x00{value.value!r}\x00".encode())
    samples = hashlib.sha256()
    for name, ref in file.tensors.items():
        start = max(0, (ref.size_bytes - _SAMPLE_BYTES) // 2)
        samples.update(file.read_range(name, start, min(ref.size_bytes, start + _SAMPLE_BYTES)).data)
    tensors = [[ref.name, ref.kind.name, list(ref.shape), ref.size_bytes] for ref in file.tensors.values()]
    return fingerprint({"metadata": digest.hexdigest(), "tensors": tensors, "samples": samples.hexdigest()})
