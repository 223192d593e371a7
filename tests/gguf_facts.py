"""Facts of a GGUF file in a form that two makers of it can be compared in, and that fits a golden file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemcut.checkpoint.read import Checkpoint
from gemcut.checkpoint.values import decode
from gemcut.families.gguf import GgufTensor, Value

LONG = 64  # members or letters: more than that goes into a golden file as a hash


def as_stored(value: Value) -> Value:
    """What comes back when a value is written: float32 rounds."""
    if value.kind != "f32":
        return value
    if isinstance(value.value, tuple):
        return Value("f32", tuple(float(np.float32(v)) for v in value.value))
    return Value("f32", float(np.float32(value.value)))


def values_of(checkpoint: Checkpoint, tensor: GgufTensor) -> NDArray[np.float32]:
    """float32 values of a tensor of a layout, made from the checkpoint."""
    if tensor.values is not None:
        return tensor.values
    assert tensor.source is not None
    ref = checkpoint.ref(tensor.source)
    decoded = decode(ref.dtype, checkpoint.read(tensor.source))
    assert decoded is not None, ref.dtype
    values = decoded.astype(np.float32).reshape(tensor.source_shape or tensor.shape)
    return (values.transpose(tensor.permute) if tensor.permute else values).reshape(tensor.shape)


def golden_keys(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Key → type and value; long ones as length and sha256."""
    return {key: [one.kind, _short(as_stored(one).value)] for key, one in metadata.items()}


def _short(value: Any) -> Any:
    if isinstance(value, (tuple, str)) and len(value) > LONG:
        text = value if isinstance(value, str) else "\0".join(map(str, value))
        return {"length": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return list(value) if isinstance(value, tuple) else value


def golden_tensor(shape: tuple[int, ...], f32: bool, values: NDArray[np.float32]) -> list[Any]:
    """Shape, type and a hash of the float32 values."""
    data = np.ascontiguousarray(values, dtype="<f4")
    return [list(shape), "F32" if f32 else "BF16", hashlib.sha256(data.tobytes()).hexdigest()[:32]]
