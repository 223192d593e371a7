"""llama-quantize's mixes as data: what each file type is made of, and which tensors it raises or lowers where.

Read a rule as "the first condition that holds gives the type; if none holds, the file type's base". Conditions look at
a `Place`: where a tensor stands among those of its role. Ported from llama.cpp's quantiser as of 0.5.0; the rules of
architectures that gemcut does not write (Falcon, the 80-layer Llama, GLM-5) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from gemcut.ggml.types import GgmlType as T


@dataclass(frozen=True, slots=True)
class FileType:
    """number: `general.file_type`.   base: the type of every tensor that no rule touches."""

    name: str
    number: int
    base: T


FILE_TYPES: Mapping[str, FileType] = {
    one.name: one
    for one in (
        FileType("F32", 0, T.F32),
        FileType("F16", 1, T.F16),
        FileType("BF16", 32, T.BF16),
        FileType("Q8_0", 7, T.Q8_0),
        FileType("Q6_K", 18, T.Q6_K),
        FileType("Q5_K_M", 17, T.Q5_K),
        FileType("Q5_K_S", 16, T.Q5_K),
        FileType("Q5_1", 9, T.Q5_1),
        FileType("Q5_0", 8, T.Q5_0),
        FileType("Q4_K_M", 15, T.Q4_K),
        FileType("Q4_K_S", 14, T.Q4_K),
        FileType("Q4_1", 3, T.Q4_1),
        FileType("Q4_0", 2, T.Q4_0),
        FileType("IQ4_NL", 25, T.IQ4_NL),
        FileType("IQ4_XS", 30, T.IQ4_XS),
        FileType("MXFP4_MOE", 38, T.MXFP4),
        FileType("Q3_K_L", 13, T.Q3_K),
        FileType("Q3_K_M", 12, T.Q3_K),
        FileType("Q3_K_S", 11, T.Q3_K),
        FileType("IQ3_M", 27, T.IQ3_S),
        FileType("IQ3_S", 26, T.IQ3_S),
        FileType("IQ3_XS", 22, T.IQ3_S),
        FileType("IQ3_XXS", 23, T.IQ3_XXS),
        FileType("Q2_K", 10, T.Q2_K),
        FileType("Q2_K_S", 21, T.Q2_K),
        FileType("Q2_0", 41, T.Q2_0),
        FileType("IQ2_M", 29, T.IQ2_S),
        FileType("IQ2_S", 28, T.IQ2_XS),
        FileType("IQ2_XS", 20, T.IQ2_XS),
        FileType("IQ2_XXS", 19, T.IQ2_XXS),
        FileType("IQ1_M", 31, T.IQ1_M),
        FileType("IQ1_S", 24, T.IQ1_S),
        FileType("TQ2_0", 37, T.TQ2_0),
        FileType("TQ1_0", 36, T.TQ1_0),
        FileType("Q1_0", 40, T.Q1_0),
    )
}
ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Publishers' variants: this body, with token embeddings and output at Q8_0.
LARGE_ENDS: Mapping[str, str] = {
    "Q6_K_L": "Q6_K",
    "Q5_K_L": "Q5_K_M",
    "Q4_K_L": "Q4_K_M",
    "Q3_K_XL": "Q3_K_L",
    "Q2_K_L": "Q2_K",
}

# Rows that a type's block does not divide are stored in this type instead; if that does not fit either, in F16.
FALLBACK: Mapping[T, T] = {
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_0: T.Q4_0,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}

# Parts of names of tensors that stay as they were converted.
UNTOUCHED = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "attn_rel_b.weight", ".position_embd", ".rel_pos", ".patch_embd", ".patch_merger",
    "sam.pos_embd", "sam.neck.", "sam.net_", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
UNTOUCHED_NAMES = ("position_embd.weight", "token_types.weight")

# These types want an importance matrix everywhere but in token embeddings and output …
WANT_IMATRIX = frozenset({T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S})
# … and Q2_K does in this file type.
Q2_K_WANTS_IMATRIX = "Q2_K_S"


# ---------------------------------------------------------------- conditions


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands, and what the file is.

    index: its layer, or its number among the tensors of its role.   count: layers, or tensors of the role.
    group: query heads per KV head in layer 0.   experts: 0 in a dense model.   imatrix: whether there is one.
    """

    index: int
    count: int
    group: int
    experts: int
    imatrix: bool


Condition: TypeAlias = Callable[[Place], bool]
Rules: TypeAlias = tuple[tuple[Condition, T], ...]


def always(_: Place) -> bool:
    return True


def grouped(place: Place) -> bool:
    """A value head is shared by so many query heads that its tensor is small and worth more bits."""
    return place.group >= 4


def grouped_or_experts(place: Place) -> bool:
    return place.group >= 4 or place.experts >= 4


def imatrix(place: Place) -> bool:
    return place.imatrix


def no_imatrix(place: Place) -> bool:
    return not place.imatrix


def first(n: int) -> Condition:
    return lambda place: place.index < n


def first_part(n: int) -> Condition:
    """The first 1/n of the layers, rounded down."""
    return lambda place: place.index < place.count // n


def middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def more_bits(place: Place) -> bool:
    """The first eighth, the last eighth, and every third between."""
    i, n = place.index, place.count
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def eight_experts(place: Place) -> bool:
    return place.experts == 8


def both(a: Condition, b: Condition) -> Condition:
    return lambda place: a(place) and b(place)


# ---------------------------------------------------------------- rules: role → file type → rules

# The smallest types have rules of their own, and count `ffn_down` and `ffn_down_exps` together as they come.
SMALLEST = frozenset({"IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})

ENDS: Mapping[str, T] = {  # output, and token embeddings that serve as output; everything else there: Q6_K, or Q8_0
    **dict.fromkeys((*SMALLEST, "IQ3_XXS"), T.Q5_K),
    "Q8_0": T.Q8_0,
    "MXFP4_MOE": T.Q8_0,
}
EMBEDDING: Mapping[str, T] = {  # token embeddings beside an output of their own
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), T.Q2_K),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), T.IQ3_S),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), T.Q4_K),
}

_EIGHT_Q8: Rules = ((eight_experts, T.Q8_0),)
_EIGHT_Q5: Rules = ((eight_experts, T.Q5_K),)

ATTN_V: Mapping[str, Rules] = {
    **dict.fromkeys(("IQ2_M", "IQ2_S"), ((grouped_or_experts, T.Q4_K), (always, T.IQ3_S))),
    **dict.fromkeys(("IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), ((grouped_or_experts, T.Q4_K), (always, T.Q2_K))),
    "Q2_K": (*_EIGHT_Q8, (grouped, T.Q4_K), (always, T.Q3_K)),
    "Q2_K_S": (*_EIGHT_Q8, (grouped, T.Q4_K)),
    "IQ3_XXS": (*_EIGHT_Q8, (grouped, T.Q4_K), (no_imatrix, T.IQ3_S)),
    **dict.fromkeys(("IQ3_XS", "IQ3_S"), (*_EIGHT_Q8, (grouped, T.Q4_K))),
    "IQ3_M": (*_EIGHT_Q8, (always, T.Q4_K)),
    "Q3_K_M": (*_EIGHT_Q8, (first(2), T.Q5_K), (always, T.Q4_K)),
    "Q3_K_L": (*_EIGHT_Q8, (always, T.Q5_K)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), (*_EIGHT_Q8, (grouped, T.Q5_K))),
    **dict.fromkeys(("Q4_K_M", "Q5_K_M"), (*_EIGHT_Q8, (more_bits, T.Q6_K))),
    "Q4_K_S": (*_EIGHT_Q8, (first(4), T.Q5_K)),
}
ATTN_K: Mapping[str, Rules] = {
    **dict.fromkeys(SMALLEST, ((eight_experts, T.Q4_K),)),
    "IQ3_XS": (*_EIGHT_Q8, (always, T.IQ3_XXS)),
    "IQ3_XXS": (*_EIGHT_Q8, (always, T.IQ2_S)),
}
ATTN_Q: Mapping[str, Rules] = {"IQ3_XS": ((always, T.IQ3_XXS),), "IQ3_XXS": ((always, T.IQ2_S),)}
ATTN_OUTPUT: Mapping[str, Rules] = {
    **dict.fromkeys(("IQ2_M", "IQ2_S"), (*_EIGHT_Q5, (always, T.IQ3_S))),
    **dict.fromkeys(("IQ1_M", "IQ1_S"), (*_EIGHT_Q5, (always, T.IQ2_XXS))),
    **dict.fromkeys(
        ("IQ2_XS", "IQ2_XXS", "IQ3_XS", "IQ3_S", "IQ4_NL", "IQ4_XS", "Q3_K_S", "Q4_K_S", "Q4_K_M"), _EIGHT_Q5
    ),
    "Q2_K": (*_EIGHT_Q5, (always, T.Q3_K)),
    "IQ3_XXS": (*_EIGHT_Q5, (always, T.IQ3_S)),
    "Q3_K_M": (*_EIGHT_Q5, (always, T.Q4_K)),
    "IQ3_M": (*_EIGHT_Q5, (always, T.Q4_K)),
    "Q3_K_L": ((eight_experts, T.Q3_K), (always, T.Q5_K)),
}
FFN_DOWN: Mapping[str, Rules] = {
    **dict.fromkeys(("IQ2_M", "IQ2_S"), ((first_part(8), T.IQ3_S),)),
    **dict.fromkeys(("IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), ((first_part(8), T.Q2_K),)),
    "Q2_K": ((always, T.Q3_K),),
    "Q2_K_S": ((first_part(8), T.Q4_K),),
    "IQ3_XXS": ((both(no_imatrix, first_part(8)), T.Q4_K), (no_imatrix, T.Q3_K)),
    "IQ3_M": ((first_part(8), T.Q4_K), (both(eight_experts, more_bits), T.Q4_K)),
    "Q3_K_M": ((first_part(16), T.Q5_K), (always, T.Q4_K)),
    "Q3_K_L": ((always, T.Q5_K),),
    **dict.fromkeys(("Q4_K_M", "Q5_K_M"), ((more_bits, T.Q6_K),)),
    "Q4_K_S": ((first_part(8), T.Q5_K),),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), ((both(no_imatrix, first_part(8)), T.Q5_K),)),
    # With importances, the plain types can go wrong in the first layers' ffn_down.
    "Q4_0": ((both(imatrix, first_part(8)), T.Q4_1),),
    "Q5_0": ((both(imatrix, first_part(8)), T.Q5_1),),
}
FFN_GATE_UP: Mapping[str, Rules] = {"IQ3_XS": ((middle, T.IQ3_XXS),)}


@dataclass(frozen=True, slots=True)
class Role:
    """A role of tensors: the first whose part stands in a tensor's name takes it.

    counted: rules look at the tensor's number among those of this role; else at its layer (in a model with experts)
        or its number (in a dense model).
    """

    parts: tuple[str, ...]
    rules: Mapping[str, Rules]
    otherwise: Rules = ()  # for file types that `rules` does not name
    counted: bool = False


ROLES = (
    Role(("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"), ATTN_V, _EIGHT_Q8, counted=True),
    Role(("attn_k.weight",), ATTN_K, _EIGHT_Q8),
    Role(("attn_q.weight",), ATTN_Q),
    Role(("attn_output.weight",), ATTN_OUTPUT),
    Role(("ffn_up",), FFN_GATE_UP),
    Role(("ffn_gate",), FFN_GATE_UP),
    Role(("ffn_down",), FFN_DOWN),
)
