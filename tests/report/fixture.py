"""A made-up but consistent run: every number in it is random, none was measured."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from gemcut.records.results import MANIFEST_SCHEMA
from gemcut.report import Check, CriterionNote, KldEntry, ModelFacts, ReportData, StageTime
from gemcut.types import (
    EXPERT_MAXIMA,
    EXPERT_SUMS,
    QUESTION_SUMS,
    Estimate,
    KldResult,
    KldRow,
    LayerPlan,
    Manifest,
    Plan,
    Question,
    Scores,
    Statistics,
    StatisticsMeta,
    TensorFact,
)

CLASSES = ("code", "prose", "math", "logic", "science", "creative")
LAYERS = tuple(range(12))
EXPERTS, KEEP, TOP_K, ITEMS = 32, 24, 4, 40


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def statistics(classes: tuple[str, ...] = CLASSES) -> Statistics:
    rng = np.random.default_rng(7)
    taste = rng.gamma(1.2, 1.0, (len(classes), len(LAYERS), EXPERTS))
    for c in range(len(classes)):
        for row in range(len(LAYERS)):
            favourites = rng.choice(EXPERTS, 3, replace=False)
            taste[c, row, favourites] += rng.gamma(2.0, 0.5 + row / 6, 3)
    questions, counts = [], []
    for c, cls in enumerate(classes):
        for i in range(ITEMS):
            tokens = int(rng.integers(90, 512))
            questions.append(Question(f"{cls}-{i}", cls, tokens, 1.0))
            p = taste[c] * rng.gamma(4.0, 0.25, taste[c].shape)
            p /= p.sum(axis=1, keepdims=True)
            counts.append(np.stack([rng.multinomial(TOP_K * tokens, q) for q in p]))
    n = np.array(counts, np.float64)
    gate = n * rng.uniform(0.18, 0.32, n.shape)
    labels = np.array([classes.index(q.cls) for q in questions])
    by_question = {name: (n if name == "n" else gate).astype(np.float32) for name in QUESTION_SUMS}
    by_class = {
        name: np.stack([(n if name == "n" else gate)[labels == c].sum(axis=0) for c in range(len(classes))])
        for name in EXPERT_SUMS + EXPERT_MAXIMA
    }
    meta = StatisticsMeta(
        schema=1,
        model_fingerprint=sha("base"),
        model_name="gemma-4-demo-moe",
        family="gemma4",
        corpus_hash=sha("calibration"),
        template_hash=sha("template"),
        bos_policy="exactly one BOS, passed as a token id",
        max_tokens_per_item=512,
        truncated_items=3,
        dtype="float32",
        classes=classes,
        questions=tuple(questions),
        layers=LAYERS,
        experts=EXPERTS,
        top_k=TOP_K,
        stack={"torch": "2.13.0"},
    )
    return Statistics(meta, sha("statistics"), by_class, by_question)


def kld_result(label: str, mean: float, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> KldResult:
    rng = np.random.default_rng([seed, *label.encode()])
    rows = []
    for cls in (*classes, "all"):
        n = 240 if cls == "all" else 40
        centre = mean * (1.0 if cls == "all" else float(rng.uniform(0.4, 1.9)))
        half = centre * (0.06 if cls == "all" else 0.15)

        def estimate(value: float, spread: float, count: int = n) -> Estimate:
            return Estimate(value, value - spread, value + spread * 1.1, count)

        top = float(np.exp(-1.7 * np.sqrt(max(centre, 0))))
        rows.append(
            KldRow(
                cls=cls,
                tokens=256 * n,
                mean=estimate(centre, half),
                median=estimate(centre / 6, half / 7),
                p99=estimate(centre * 9, half * 14),
                same_top=Estimate(top, top - 0.2 * half, min(1.0, top + 0.2 * half), n),
                ln_ppl_ratio=estimate(centre * 0.7, half * 1.3),
                ppl_base=4.1,
                ppl_candidate=4.1 * float(np.exp(centre * 0.7)),
            )
        )
    return KldResult(
        base_fingerprint=sha("base"),
        candidate_fingerprint=sha("base") if mean == 0 else sha("candidate" if label == "class_rank" else label),
        candidate=label,
        corpus_hash=sha("held out"),
        template_hash=sha("template"),
        dtype="float32",
        chunks=240,
        seed=0,
        rows=tuple(rows),
    )


def plan_and_scores(stats: Statistics) -> tuple[Plan, Scores, dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(3)
    share = stats.by_class["g"] / stats.by_class["g"].sum(axis=2, keepdims=True)
    values = share.max(axis=0) * EXPERTS
    rank = np.argsort(np.argsort(-values, axis=1), axis=1)
    guards = {name: np.zeros(values.shape, bool) for name in ("super expert", "class floor")}
    for row in range(len(LAYERS)):
        guards["super expert"][row, int(rng.integers(EXPERTS))] = row % 4 == 1
        guards["class floor"][row, np.argsort(-values[row])[KEEP + row % 5]] = row % 3 == 0
    held = guards["super expert"] | guards["class floor"]
    order = np.argsort(-(values + 1e6 * held), axis=1)
    layers = {}
    for row, layer in enumerate(LAYERS):
        keep = tuple(sorted(int(e) for e in order[row, :KEEP]))
        drop = {int(e): f"score rank {rank[row, e] + 1} of {EXPERTS}" for e in order[row, KEEP:]}
        layers[layer] = LayerPlan(keep, drop)
    distance = (KEEP - 0.5 - rank + rng.normal(0, 0.5, rank.shape)) / 0.7
    probability = np.clip(np.round(1 / (1 + np.exp(-distance)) * 200) / 200, 0, 1)
    probability[held] = 1.0
    plan = Plan(
        "experts",
        sha("base"),
        EXPERTS,
        layers,
        "class_rank",
        {"breadth": 0.5, "floor": 2},
        stats.meta.corpus_hash,
        sha("statistics"),
    )
    scores = Scores(
        "class_rank",
        {"breadth": 0.5},
        "experts",
        LAYERS,
        values,
        sha("base"),
        sha("statistics"),
        stats.meta.corpus_hash,
    )
    return plan, scores, guards, probability


def manifest(plan: Plan) -> Manifest:
    facts = [
        TensorFact(
            "model.language_model.embed_tokens.weight", "same", "BF16", (4096, 256), (4096, 256), sha("e"), sha("e")
        )
    ]
    shapes = {
        "experts.gate_up_proj": ((32, 352, 256), (24, 352, 256)),
        "experts.down_proj": ((32, 256, 176), (24, 256, 176)),
        "router.proj.weight": ((32, 256), (24, 256)),
        "router.per_expert_scale": ((32,), (24,)),
    }
    for layer in LAYERS:
        head = f"model.language_model.layers.{layer}"
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.down_proj.weight",
            "input_layernorm.weight",
        ):
            facts.append(TensorFact(f"{head}.{name}", "same", "BF16", (256, 256), (256, 256), sha(name), sha(name)))
        for name, (before, after) in shapes.items():
            facts.append(
                TensorFact(
                    f"{head}.{name}",
                    "take",
                    "BF16",
                    before,
                    after,
                    sha(name),
                    sha(name + "'"),
                    0,
                    plan.layers[layer].keep,
                )
            )
    files = {
        name: sha(name)
        for name in (
            "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
            "model.safetensors.index.json", "chat_template.jinja", "generation_config.json",
        )
    }  # fmt: skip
    return Manifest(
        MANIFEST_SCHEMA, sha("base"), sha("candidate"), tuple(facts), {"text_config.num_experts": (32, 24)}, files,
        BASE.size_bytes, CANDIDATE.size_bytes,
    )  # fmt: skip


BASE = ModelFacts(
    name="gemma-4-demo-moe",
    architecture="Gemma4ForConditionalGeneration",
    dtype="bfloat16",
    parameters=14_812_416,
    size_bytes=29_630_144,
    components={
        "experts": 20_766_720,
        "attention": 4_194_304,
        "dense mlp": 2_359_296,
        "embedding": 2_097_152,
        "other": 212_672,
    },
    layers=12,
    fingerprint=sha("base"),
    units=32,
    top_k=4,
    hub_id="example/gemma-4-demo-moe",
    licence="apache-2.0",
    pipeline_tag="text-generation",
)
CANDIDATE = dataclasses.replace(
    BASE,
    name="gemma-4-demo-moe-24e",
    parameters=12_216_576,
    size_bytes=24_438_464,
    components={**BASE.components, "experts": 15_575_040},
    fingerprint=sha("candidate"),
    units=24,
)


def full(classes: tuple[str, ...] = CLASSES) -> ReportData:
    stats = statistics(classes)
    plan, scores, guards, probability = plan_and_scores(stats)
    means = {
        "class_rank": 0.0312, "reap": 0.0335, "class_max": 0.0371, "easy_ep": 0.0402, "ean": 0.0448, "coverage": 0.0512,
        "frequency": 0.0627, "random (5 seeds)": 0.231, "base": 0.0,
    }  # fmt: skip
    return ReportData(
        title="gemma-4-demo-moe cut to 24 experts",
        base=BASE,
        candidate=CANDIDATE,
        plan=plan,
        scores={"class_rank": scores},
        statistics=stats,
        keep_probability=probability,
        bootstrap_rounds=200,
        protected=guards,
        kld=tuple(KldEntry(label, kld_result(label, mean, classes)) for label, mean in means.items()),
        chosen="class_rank",
        manifest=manifest(plan),
        checks=(
            Check("bytes agree with the plan", True, "48 of 48 tensors are the planned slices"),
            Check("everything else is byte-identical", True, "49 tensors"),
            Check("loads", True, "no missing or unexpected keys"),
            Check("cut equals masking the router", True, "largest logit difference 0.0 on 8 prompts"),
        ),
        stages=(
            StageTime("inspect", 0.04, 61 << 20),
            StageTime("observe", 93.4, 912 << 20),
            StageTime("score", 0.8, 240 << 20),
            StageTime("plan", 3.1, 260 << 20),
            StageTime("cut", 0.4, 190 << 20),
            StageTime("kld", 187.0, 845 << 20),
        ),
        recipe="name: demo-24e\nbase: demo/moe\nplan:\n  criterion: class_rank\n  keep: 24\n",
        commands=("gemcut run recipes/demo-24e.yaml", "gemcut verify gemma-4-demo-moe-24e --base gemma-4-demo-moe"),
        versions={"gemcut": "0.1.0", "torch": "2.13.0", "transformers": "5.22.0", "numpy": "2.3.4"},
        seeds={"bootstrap": 0, "kld": 0},
        criteria=(
            CriterionNote("class_rank", "Σ_c w_c · rank_c(e) + breadth bonus", "the C6 drop map of OmniMergeKit"),
        ),
        calibration_corpus="demo calibration split",
        evaluation_corpus="demo held-out split",
        limits=(
            "All figures are demo figures: they were measured on a small model that was trained for this purpose.",
        ),
    )
