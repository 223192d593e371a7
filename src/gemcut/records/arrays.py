"""Arrays that lie beside a JSON record: their hash, names and forms are checked before a value is believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gemcut.errors import CheckpointError
from gemcut.store import sha256_file
from gemcut.types import F64


def read_arrays(path: Path, sha256: str, forms: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> dict[str, F64]:
    """Those of `forms` (name → dtype, shape) that are in the file, as float64; `values` must be.

    Raises:
        CheckpointError: no such file, another hash, an array that nobody asked for, or of another form.
    """
    out: dict[str, F64] = {}
    try:
        if sha256_file(path) != sha256:
            raise CheckpointError(
                f"the {what} are not what was recorded", where=path.name, hint="make them again from the same inputs"
            )
        with safe_open(path, framework="numpy") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                ref = f.get_slice(name)
                form = (str(ref.get_dtype()), tuple(ref.get_shape()))
                if form != forms.get(name):
                    raise CheckpointError(
                        f"{name} has another form", where=path.name, got=form, wanted=forms.get(name, "nothing")
                    )
                out[name] = f.get_tensor(name).astype(np.float64, copy=False)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read the {what}: {error}", where=path.name) from None
    if "values" not in out:
        raise CheckpointError(f"the {what} hold no values", where=path.name)
    return out
