"""Statistics that look like an observed MoE: routed tokens, sums that agree with each other, specialised experts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gemcut.records import LayerFile, save_statistics_index
from gemcut.store import sha256_file
from gemcut.types import EXPERT_SUMS, F32, F64, QUESTION_SUMS, Question, Statistics, StatisticsMeta


def make_statistics(
    rng: np.random.Generator,
    classes: Sequence[str] = ("code", "math", "prose"),
    L: int = 3,
    E: int = 8,
    Q: int = 12,
    k: int = 2,
    tokens: int = 40,
) -> Statistics:
    """Every question routes each of its tokens to exactly k experts of each layer; each class has its favourites.

    Per question the sums are drawn once in float32, and the class sums are their float64 sums, so that both views
    agree exactly. Σ_e n = k · tokens.
    """
    class_of = np.arange(Q) % len(classes)
    counts = rng.integers(tokens // 2, tokens + 1, Q)
    taste = rng.dirichlet(np.full(E, 0.5), (len(classes), L)) + 1e-3  # [C, L, E]
    size = rng.lognormal(0.0, 0.7, (L, E))
    n = np.zeros((Q, L, E))
    for q in range(Q):
        for layer in range(L):
            logits = np.log(taste[class_of[q], layer]) + rng.gumbel(size=(counts[q], E))
            picks = np.argsort(-logits, axis=1)[:, :k]
            n[q, layer] = np.bincount(picks.ravel(), minlength=E)
    wobble = rng.lognormal(0.0, 0.2, (Q, L, E))
    g = n * rng.uniform(0.3, 0.7, (Q, L, E))
    f = n * size * wobble
    by_question: dict[str, F32] = {
        "n": n.astype(np.float32),
        "g": g.astype(np.float32),
        "f": f.astype(np.float32),
        "f2": (f * size * wobble * 1.1).astype(np.float32),
        "gf": (g * size * wobble).astype(np.float32),
        "easy": (g * size * wobble * rng.uniform(0.01, 0.1, (Q, L, E))).astype(np.float32),
    }
    questions = tuple(
        Question(id=f"q{q:03}", cls=classes[class_of[q]], tokens=int(counts[q]), weight=1.0) for q in range(Q)
    )
    by_class = class_sums(by_question, class_of, len(classes))
    by_class["gf2"] = by_class["gf"] ** 2 / np.maximum(by_class["n"], 1)
    by_class["gf_rel"] = by_class["gf"] * rng.uniform(0.1, 0.2, (1, L, 1))
    by_class["f_max"] = np.where(by_class["n"] > 0, size * rng.uniform(1, 2, by_class["n"].shape), 0.0)
    meta = StatisticsMeta(
        schema=1,
        model_fingerprint="ab" * 32,
        model_name="synthetic",
        family="gemma4",
        corpus_hash="cd" * 32,
        template_hash="ef" * 32,
        bos_policy="one",
        max_tokens_per_item=4096,
        truncated_items=0,
        dtype="float32",
        classes=tuple(classes),
        questions=questions,
        layers=tuple(range(L)),
        experts=E,
        top_k=k,
        stack={"numpy": np.__version__},
    )
    digest = hashlib.sha256(b"".join(by_question[name].tobytes() for name in QUESTION_SUMS)).hexdigest()
    return Statistics(meta=meta, fingerprint=digest, by_class=by_class, by_question=by_question)


def class_sums(by_question: Mapping[str, F32], class_of: np.ndarray, classes: int) -> dict[str, F64]:
    """The float64 class sums of per-question sums."""
    out: dict[str, F64] = {}
    for name, array in by_question.items():
        out[name] = np.zeros((classes, *array.shape[1:]))
        np.add.at(out[name], class_of, array.astype(np.float64))
    return out


def hand_statistics(
    gf: Sequence[Sequence[Sequence[float]]],
    class_of: Sequence[str],
    n: Sequence[Sequence[Sequence[float]]] | None = None,
) -> Statistics:
    """Statistics from per-question numbers [Q, L, E] that a test can do in its head.

    n defaults to 1 wherever gf is above 0. g = n/2, f = 2·gf, f2 = f²/n, easy = gf/10, gf_rel = gf/4, f_max = f/n.
    """
    gf32 = np.array(gf, np.float32)
    n32 = np.array(n, np.float32) if n is not None else (gf32 > 0).astype(np.float32)
    classes = tuple(dict.fromkeys(class_of))
    per_token = np.divide(2 * gf32, n32, out=np.zeros_like(gf32), where=n32 > 0)
    by_question = {
        "n": n32,
        "g": n32 / 2,
        "f": 2 * gf32,
        "f2": 2 * gf32 * per_token,
        "gf": gf32,
        "easy": gf32 / 10,
    }
    position = np.array([classes.index(c) for c in class_of])
    by_class = class_sums(by_question, position, len(classes))
    by_class["gf2"] = by_class["gf"] ** 2
    by_class["gf_rel"] = by_class["gf"] / 4
    by_class["f_max"] = np.divide(
        by_class["f"], by_class["n"], out=np.zeros_like(by_class["f"]), where=by_class["n"] > 0
    )
    base = make_statistics(np.random.default_rng(0), classes, L=gf32.shape[1], E=gf32.shape[2], Q=len(class_of), k=1)
    tokens = n32[:, 0].sum(axis=1)
    questions = tuple(Question(f"q{q}", c, max(1, int(tokens[q])), 1.0) for q, c in enumerate(class_of))
    meta = replace(base.meta, classes=classes, questions=questions)
    return Statistics(meta=meta, fingerprint="12" * 32, by_class=by_class, by_question=by_question)


def with_weights(stats: Statistics, weights: Sequence[float]) -> Statistics:
    """The same sums under other question weights."""
    questions = tuple(replace(q, weight=w) for q, w in zip(stats.meta.questions, weights, strict=True))
    return replace(stats, meta=replace(stats.meta, questions=questions))


def permute_experts(stats: Statistics, order: np.ndarray) -> Statistics:
    """Expert i of the result is expert order[i] of `stats`."""
    return replace(
        stats,
        by_class={name: array[:, :, order] for name, array in stats.by_class.items()},
        by_question={name: array[:, :, order] for name, array in stats.by_question.items()},
    )


def pick_questions(stats: Statistics, index: Sequence[int]) -> Statistics:
    """The statistics of some questions alone; sums that are not kept per question are shared out by Σ g·‖f‖."""
    by_question = {name: array[list(index)] for name, array in stats.by_question.items()}
    questions = tuple(stats.meta.questions[i] for i in index)
    position = np.array([stats.meta.classes.index(q.cls) for q in questions], np.int64)
    by_class = class_sums(by_question, position, len(stats.meta.classes))
    part = by_class["gf"] / np.where(stats.by_class["gf"] > 0, stats.by_class["gf"], 1)
    for name in ("gf2", "gf_rel"):
        by_class[name] = stats.by_class[name] * part
    by_class["f_max"] = stats.by_class["f_max"] * (by_class["n"] > 0)
    return Statistics(replace(stats.meta, questions=questions), stats.fingerprint, by_class, by_question)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Two shards of one observation."""
    by_class = {name: a.by_class[name] + b.by_class[name] for name in EXPERT_SUMS}
    by_class["f_max"] = np.maximum(a.by_class["f_max"], b.by_class["f_max"])
    by_question = {name: np.concatenate([a.by_question[name], b.by_question[name]]) for name in QUESTION_SUMS}
    meta = replace(a.meta, questions=(*a.meta.questions, *b.meta.questions))
    return Statistics(meta, a.fingerprint, by_class, by_question)


def write_statistics(stats: Statistics, folder: Path) -> str:
    """The folder that observe writes, with tensors beside the expert sums that no score may need."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for row, layer in enumerate(stats.meta.layers):
        tensors: dict[str, np.ndarray] = {
            f"experts.by_class.{name}": np.ascontiguousarray(array[:, row]) for name, array in stats.by_class.items()
        }
        tensors |= {
            f"experts.by_question.{name}": np.ascontiguousarray(array[:, row])
            for name, array in stats.by_question.items()
        }
        tensors["gram.self_attn.o_proj"] = np.full((4, 4), np.nan, np.float32)  # read by nobody here
        name = f"layer-{layer:03}.safetensors"
        save_file(tensors, folder / name)
        files.append(LayerFile(layer=layer, file=name, sha256=sha256_file(folder / name)))
    return save_statistics_index(folder, stats.meta, files, stats.fingerprint)
