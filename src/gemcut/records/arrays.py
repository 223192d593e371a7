"""Arrays that lie beside a JSON record, one file written for the other: their hash, names and forms are checked before
a value is believed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemcut.errors import CheckpointError
from gemcut.store import atomic_folder, sha256_file, write_json
from gemcut.types import F64, Json

SHA256 = "values_sha256"  # in the record


def save_arrays(
    folder: Path, record: str, arrays: Mapping[str, NDArray[Any]], body: Mapping[str, Json], *, force: bool = False
) -> None:
    """Write a folder: `body` and the arrays' hash as the JSON file `record`, and the arrays under the same stem.

    Raises:
        UsageError: `folder` exists and `force` is not given.
    """
    with atomic_folder(folder, force=force) as partial:
        values = beside(partial / record)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, values)
        write_json(partial / record, {**body, SHA256: sha256_file(values)})


def beside(record: Path) -> Path:
    """The file of arrays that belongs to a record."""
    return record.with_suffix(".safetensors")


@contextlib.contextmanager
def open_arrays(path: Path, sha256: str, what: str) -> Iterator[Any]:
    """The file as safetensors opens it.

    Raises:
        CheckpointError: no such file, another hash, or no safetensors.
    """
    try:
        if sha256_file(path) != sha256:
            raise CheckpointError(
                f"the {what} are not what was recorded", where=path.name, hint="make them again from the same inputs"
            )
        with safe_open(path, framework="numpy") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read the {what}: {error}", where=path.name) from None


def read_arrays(path: Path, sha256: str, forms: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> dict[str, F64]:
    """Those of `forms` (name → dtype, shape) that are in the file, as float64; `values` must be.

    Raises:
        CheckpointError: no such file, another hash, an array that nobody asked for, or of another form.
    """
    out: dict[str, F64] = {}
    with open_arrays(path, sha256, what) as f:
        for name in f.keys():  # noqa: SIM118 - not a dict
            ref = f.get_slice(name)
            form = (str(ref.get_dtype()), tuple(ref.get_shape()))
            if form != forms.get(name):
                raise CheckpointError(
                    f"{name} has another form", where=path.name, got=form, wanted=forms.get(name, "nothing")
                )
            out[name] = f.get_tensor(name).astype(np.float64, copy=False)
    if "values" not in out:
        raise CheckpointError(f"the {what} hold no values", where=path.name)
    return out
