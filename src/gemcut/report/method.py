"""How it was made, and what bounds its figures: the rows of the method section and the list of limits."""

from __future__ import annotations

from gemcut.report.data import ALL, ReportData, Table
from gemcut.report.nvfp4 import nvfp4_limits, nvfp4_method
from gemcut.report.quants import limits_of
from gemcut.report.spelling import count, duration, json_text, size
from gemcut.report.tables import by_damage, near_ties, units_name

SHORT_HASH = 12
CARD = "README.md"
LONG_CELL = 240  # characters


def short(digest: str) -> str:
    """The first characters of a hash: enough to recognise it; the whole one stands in the manifest."""
    return digest[:SHORT_HASH] + "…" if len(digest) > SHORT_HASH else digest or "–"


def method_rows(data: ReportData) -> Table:
    """What was observed, how it was ranked and on what it was measured, as pairs."""
    rows: list[tuple[str, str]] = [
        ("Base", f"{data.base.name}, fingerprint {short(data.base.fingerprint)}"),
        ("Architecture", f"{data.base.architecture}, {data.base.layers} layers, {data.base.dtype}"),
    ]
    if data.statistics is not None:
        meta = data.statistics.meta
        corpus = data.calibration_corpus or "corpus"
        rows += [
            ("Calibration corpus", f"{corpus}, hash {short(meta.corpus_hash)}"),
            ("Calibration text", f"{count(len(meta.questions))} items, {count(meta.tokens)} tokens"),
            ("Calibration classes", _classes(data)),
            (
                "Item length limit",
                f"{count(meta.max_tokens_per_item)} tokens; {count(meta.truncated_items)} items were truncated",
            ),
            ("Chat template", f"hash {short(meta.template_hash)}"),
            ("BOS", meta.bos_policy),
            ("Observed in", meta.dtype),
        ]
        if meta.experts:
            rows.append(("Router", f"{meta.experts} experts, top {meta.top_k}, {len(meta.layers)} layers with experts"))
    if data.plan is not None:
        rows.append(("Criterion", data.plan.criterion))
        # the guarded units are in the figure and in the table of dropped units, notes have a line of their own
        params = {key: value for key, value in data.plan.params.items() if key not in ("guarded", "notes")}
        if params:
            rows.append(("Its parameters", json_text(params)))
        if notes := data.plan.params.get("notes"):
            rows.append(("Notes of the plan", json_text(notes)))
    for note in data.criteria:
        if data.plan is None or note.name == data.plan.criterion:
            rows.append((f"Formula of {note.name}", f"{note.formula} ({note.source})"))
    if data.keep_probability is not None and data.bootstrap_rounds:
        rows.append(
            ("Bootstrap", f"{count(data.bootstrap_rounds)} resamplings of the calibration items within classes")
        )
    if data.quants is not None:
        rows += data.quants.method
    if data.nvfp4 is not None:
        rows += nvfp4_method(data.nvfp4)
    rows += _measurement(data)
    if data.seeds:
        rows.append(("Seeds", ", ".join(f"{name} {seed}" for name, seed in data.seeds.items())))
    return Table(("What", "How"), tuple(rows), "ll")


def _classes(data: ReportData) -> str:
    assert data.statistics is not None
    meta = data.statistics.meta
    parts = []
    for cls in meta.classes:
        items = [question for question in meta.questions if question.cls == cls]
        parts.append(f"{cls} ({count(len(items))} items, {count(sum(q.tokens for q in items))} tokens)")
    return ", ".join(parts)


def _measurement(data: ReportData) -> list[tuple[str, str]]:
    entry = data.entry or next(iter(data.kld), None)
    if entry is None and data.quants is not None:
        entry = next((one.kld for one, _ in data.quants.measured), None)
    if entry is None and data.nvfp4 is not None:
        entry = data.nvfp4.kld
    if entry is None:
        return []
    result = entry.result
    corpus = data.evaluation_corpus or "corpus"
    rows = [
        ("Evaluation corpus", f"{corpus}, hash {short(result.corpus_hash)}"),
        (
            "Measured on",
            f"{count(result.chunks)} chunks in {result.dtype}, template hash {short(result.template_hash)}",
        ),
        (
            "Measure",
            "KL(base ‖ candidate) in nats per token; intervals are 95 % from a bootstrap over chunks within classes",
        ),
    ]
    pooled = entry.row(ALL)
    if pooled is not None:
        rows.insert(2, ("Evaluated tokens", count(pooled.tokens)))
    return rows


def config_rows(data: ReportData) -> Table | None:
    """Keys of config.json that changed."""
    if data.manifest is None or not data.manifest.config_changes:
        return None
    changes = data.manifest.config_changes.items()
    rows = tuple((key, *(_clipped(json_text(value)) for value in (a, b))) for key, (a, b) in changes)
    return Table(("Key in config.json", "Base", "This model"), rows, "lrr")


def _clipped(text: str) -> str:
    """A cell that can be read: how a checkpoint was quantised takes a page."""
    return text if len(text) <= LONG_CELL else f"{text[:LONG_CELL]}… (see config.json)"


def file_rows(data: ReportData) -> Table | None:
    """Every file of the written folder with its whole sha256, the base's card excepted: this one takes its place."""
    if data.manifest is None or not data.manifest.files:
        return None
    return Table(
        ("File", "sha256"),
        tuple(sorted((name, digest) for name, digest in data.manifest.files.items() if name != CARD)),
        "ll",
    )


def check_rows(data: ReportData) -> Table | None:
    """What `verify` asked of the written bytes."""
    if not data.checks:
        return None
    rows = tuple((check.name, "passed" if check.passed else "FAILED", check.detail or "–") for check in data.checks)
    return Table(("Check", "Result", "Detail"), rows, "lll")


def stage_rows(data: ReportData) -> Table | None:
    """Wall time and peak memory of the run that made this: one run, not a benchmark."""
    if not data.stages:
        return None
    rows = [
        (stage.name, duration(stage.seconds), "–" if stage.peak_bytes is None else size(stage.peak_bytes))
        for stage in data.stages
    ]
    peaks = [stage.peak_bytes for stage in data.stages if stage.peak_bytes is not None]
    rows.append(("all stages", duration(sum(s.seconds for s in data.stages)), size(max(peaks)) if peaks else "–"))
    return Table(("Stage", "Wall time, one run", "Peak memory, one run"), tuple(rows), "lrr", len(rows) - 1)


def manifest_sentence(data: ReportData) -> str | None:
    """What the bytes say, in one sentence."""
    if data.manifest is None:
        return None
    facts = data.manifest.tensors
    same = sum(fact.found == "same" for fact in facts)
    changed = len(facts) - same
    text = f"Of {count(len(facts))} tensors {count(same)} are byte-identical to the base and {count(changed)} differ"
    kinds = {"take": "cut", "mask": "masked", "values": "changed in value", "reshaped": "reshaped", "added": "added",
             "removed": "removed"}  # fmt: skip
    parts = [
        f"{count(number)} {kinds[kind]}"
        for kind in kinds
        if (number := sum(fact.found == kind for fact in facts))
    ]  # fmt: skip
    return text + (f" ({', '.join(parts)})." if parts else ".")


def limits(data: ReportData) -> tuple[str, ...]:
    """What a reader must know before quoting a figure: found from the data, then what the pipeline adds."""
    out: list[str] = []
    entry = data.entry
    if any(not check.passed for check in data.checks):
        failed = ", ".join(check.name for check in data.checks if not check.passed)
        out.append(f"Verification FAILED: {failed}. Do not use these weights.")
    if data.quants is not None:
        out += limits_of(data.quants)
    if data.nvfp4 is not None:
        out += nvfp4_limits(data.nvfp4)
    if entry is None and not data.only_quants and not data.only_nvfp4:
        out.append("The damage of this cut has not been measured on held-out text.")
    if entry is not None or (data.quants is not None and data.quants.measured):
        out.append(
            "KLD compares next-token distributions on given text. It is no benchmark score and says nothing about "
            "long generations, tools or languages that the evaluation corpus does not hold."
        )
    if entry is not None:
        ranked = [one.label for one in by_damage(data.kld) if not one.is_noise_floor]
        if entry.label in ranked[1:]:
            better = ", ".join(ranked[: ranked.index(entry.label)])
            out.append(f"{entry.label} is not the best candidate of this test: {better} did less damage.")
        if len(ranked) > 1:
            out.append(
                "All candidates were measured on the same chunks, so their intervals move together: overlap alone does "
                "not mean that two of them are equal."
            )
        corpus = data.statistics.meta.corpus_hash if data.statistics else data.plan.corpus_hash if data.plan else ""
        if corpus and corpus == entry.result.corpus_hash:
            out.append("The cut was chosen and measured on the same corpus: the damage shown is too low.")
        if data.manifest is not None and data.manifest.fingerprint != entry.result.candidate_fingerprint:
            out.append(
                f"The measured candidate ({short(entry.result.candidate_fingerprint)}) is not the written folder "
                f"({short(data.manifest.fingerprint)}): it was measured before it was written."
            )
    if ties := near_ties(data):
        out.append(
            f"{count(ties)} {units_name(data, ties)} are near ties: another draw of the calibration items would decide "
            "differently about some of them."
        )
    if data.base.licence is None:
        out.append("The base states no licence, so none is given here: ask its owner before you publish.")
    return (*out, *data.limits)
