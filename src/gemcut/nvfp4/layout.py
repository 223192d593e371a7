"""The two layouts of an NVFP4 checkpoint on disk: names and forms of the tensors, and what config.json says.

                       compressed-tensors              modelopt
codes                  X.weight_packed   U8            X.weight          U8
block scales           X.weight_scale    F8_E4M3       X.weight_scale    F8_E4M3
weights' scale         X.weight_global_scale  F32 [1], G = 2688 / A      X.weight_scale_2  F32 [], 1 / G
inputs' scale (W4A4)   X.input_global_scale   F32 [1], 2688 / A_x        X.input_scale     F32 [], A_x / 2688
FP8 cache              self_attn.{k,v}_scale  BF16 [1]                   k_proj.k_scale, v_proj.v_scale  F32 []

Source: compressed-tensors 0.20 (QuantizationConfig, nvfp4-pack-quantized); modelopt 0.47 (export/quant_utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemcut import __version__
from gemcut.checkpoint.made import new_tensor
from gemcut.errors import CheckpointError, UsageError
from gemcut.families.linears import Matrix
from gemcut.nvfp4.choices import LAYOUTS, Layout, Scheme
from gemcut.types import Json, TensorRef

QUANTIZATION = "quantization_config"  # in config.json
# With an FP8 cache compressed-tensors asks the decoder's config for one number of KV heads, which transformers ≥ 5.15
# answers for layers that differ only where this key is set.
HEADS_KEY = "allow_global_per_layer_attribute_access"
HF_QUANT = "hf_quant_config.json"
RECIPE = "recipe.yaml"
_FORMAT = "nvfp4-pack-quantized"
_WRITTEN_FOR = "0.20.0"  # release of compressed-tensors whose form this is
_GROUP = 16


@dataclass(frozen=True, slots=True)
class Names:
    """Ends of the tensors' names in one layout.   scalar: the shape of a number.   divisor: G itself, not 1 / G."""

    packed: str
    scales: str
    scale: str
    inputs: str
    scalar: tuple[int, ...]
    divisor: bool


NAMES: Mapping[Layout, Names] = {
    "compressed-tensors": Names(
        ".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale", (1,), divisor=True
    ),
    "modelopt": Names(".weight", ".weight_scale", ".weight_scale_2", ".input_scale", (), divisor=False),
}


def tensors_of(matrix: Matrix, layout: Layout, scheme: Scheme) -> tuple[TensorRef, ...]:
    """One matrix on disk: its scales first, so that they are aligned, then the codes, then the blocks' scales."""
    names, module = NAMES[layout], matrix.module
    out = [new_tensor(module + names.scale, "F32", names.scalar)]
    if scheme == "NVFP4":
        out.append(new_tensor(module + names.inputs, "F32", names.scalar))
    out.append(new_tensor(module + names.packed, "U8", (matrix.rows, matrix.columns // 2)))
    out.append(new_tensor(module + names.scales, "F8_E4M3", (matrix.rows, matrix.columns // _GROUP)))
    return tuple(out)


def cache_tensors(attention: str, layout: Layout) -> tuple[TensorRef, TensorRef]:
    """k and v scale of one layer; `attention` is the path of its attention module."""
    if layout == "modelopt":
        names = (f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale")
        return new_tensor(names[0], "F32", ()), new_tensor(names[1], "F32", ())
    return new_tensor(f"{attention}.k_scale", "BF16", (1,)), new_tensor(f"{attention}.v_scale", "BF16", (1,))


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a config.json says.   cache: keys and values are FP8."""

    layout: Layout
    scheme: Scheme
    ignore: tuple[str, ...]
    cache: bool


def is_nvfp4(config: Mapping[str, Json]) -> bool:
    """Whether config.json speaks of NVFP4 weights, in either layout."""
    said = config.get(QUANTIZATION)
    if not isinstance(said, dict):
        return False
    return "nvfp4" in str(said.get("format", "")).lower() or "NVFP4" in str(said.get("quant_algo", ""))


def read_config(config: Mapping[str, Json], where: str) -> Told:
    """Layout and scheme of an NVFP4 checkpoint.

    Raises:
        CheckpointError: config.json does not say them.
    """
    said = config.get(QUANTIZATION)
    if not isinstance(said, dict) or not is_nvfp4(config) or said.get("quant_method") not in LAYOUTS:
        raise CheckpointError(
            "config.json does not speak of NVFP4", where=f"{where}, config.json: {QUANTIZATION}", got=str(said)[:80]
        )
    groups, ignore = said.get("config_groups"), said.get("ignore")
    group = groups.get("group_0") if isinstance(groups, dict) else None
    if not isinstance(group, dict) or not isinstance(ignore, list) or not all(isinstance(one, str) for one in ignore):
        raise CheckpointError(
            "config.json does not say what is quantised", where=f"{where}, {QUANTIZATION}: config_groups, ignore"
        )
    return Told(
        "modelopt" if said["quant_method"] == "modelopt" else "compressed-tensors",
        "NVFP4" if group.get("input_activations") is not None else "NVFP4A16",
        tuple(str(one) for one in ignore),
        said.get("kv_cache_scheme") is not None,
    )


def refuse_quantised(config: Mapping[str, Json], where: str) -> None:
    """A checkpoint that is quantised already has no weights to quantise.

    Raises:
        UsageError: config.json says how it was quantised.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        found = part.get(QUANTIZATION)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise UsageError(
                "this checkpoint is quantised already",
                where=f"{where}, config.json: {QUANTIZATION}",
                got=str(method)[:60],
                wanted="weights in BF16, F16 or F32",
                hint="start from the checkpoint that it was made from; --convert changes only the layout",
            )


def config_with(
    config: Mapping[str, Json], scheme: Scheme, layout: Layout, ignore: Sequence[str], *, kv: bool
) -> dict[str, Json]:
    """config.json of the new checkpoint: the base's, `quantization_config`, and for an FP8 cache HEADS_KEY."""
    plain = {key: value for key, value in config.items() if key != QUANTIZATION}
    if kv:
        text = plain.get("text_config")
        if isinstance(text, dict):
            plain["text_config"] = {**text, HEADS_KEY: True}
        else:
            plain[HEADS_KEY] = True
    if layout == "modelopt":
        return {**plain, QUANTIZATION: _modelopt(scheme, ignore, kv=kv)}
    return {**plain, QUANTIZATION: _compressed_tensors(scheme, ignore, kv=kv)}


def _four_bits(dynamic: Json, observer: str) -> dict[str, Json]:
    return {
        "actorder": None, "block_structure": None, "dynamic": dynamic, "group_size": _GROUP, "num_bits": 4,
        "observer": observer, "observer_kwargs": {}, "scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group",
        "symmetric": True, "type": "float", "zp_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip


def _compressed_tensors(scheme: Scheme, ignore: Sequence[str], *, kv: bool) -> dict[str, Json]:
    group: dict[str, Json] = {
        "format": _FORMAT,
        "input_activations": _four_bits("local", "static_minmax") if scheme == "NVFP4" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _four_bits(False, "memoryless_minmax"),
    }
    return {
        "config_groups": {"group_0": group},
        "format": _FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": _eight_bits() if kv else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _WRITTEN_FOR,
    }


def _algorithm(scheme: Scheme) -> str:
    return "NVFP4" if scheme == "NVFP4" else "W4A16_NVFP4"


def _modelopt(scheme: Scheme, exclude: Sequence[str], *, kv: bool) -> dict[str, Json]:
    four: dict[str, Json] = {"dynamic": False, "group_size": _GROUP, "num_bits": 4, "type": "float"}
    eight: dict[str, Json] = {"dynamic": False, "num_bits": 8, "type": "float"}
    group: dict[str, Json] = {"targets": ["Linear"], "weights": four}
    if scheme == "NVFP4":
        group["input_activations"] = dict(four)
    out: dict[str, Json] = {
        "config_groups": {"group_0": group},
        "ignore": list(exclude),
        "producer": _producer(),
        "quant_algo": _algorithm(scheme),
        "quant_method": "modelopt",
    }
    return {**out, "kv_cache_scheme": eight} if kv else out


def hf_quant_config(scheme: Scheme, exclude: Sequence[str], *, kv: bool) -> dict[str, Json]:
    """What modelopt's readers look for beside config.json."""
    quantization: dict[str, Json] = {
        "quant_algo": _algorithm(scheme),
        "kv_cache_quant_algo": "FP8" if kv else None,
        "group_size": _GROUP,
        "exclude_modules": list(exclude),
    }
    return {"producer": _producer(), "quantization": quantization}


def _producer() -> dict[str, Json]:
    return {"name": "gemcut", "version": __version__}


def recipe_text(scheme: Scheme, ignore: Sequence[str], *, kv: bool) -> str:
    """recipe.yaml: how llm-compressor would have been told the same. Strings are quoted as JSON, which YAML reads."""
    modifier: dict[str, Json] = {"targets": ["Linear"], "scheme": scheme, "ignore": list(ignore)}
    if kv:
        modifier["kv_cache_scheme"] = _eight_bits()
    lines = [f"      {key}: {json.dumps(value)}\n" for key, value in modifier.items()]
    return "".join(("default_stage:\n  default_modifiers:\n    QuantizationModifier:\n", *lines))


def _eight_bits() -> dict[str, Json]:
    return {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
