"""`canary.json` and the cached answers of a base: what two models said to the same prompts, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from gemcut.errors import CheckpointError
from gemcut.records.fields import Fields, open_record, to_json
from gemcut.store import canonical_json, write_bytes, write_json
from gemcut.types import Estimate, Json

ANSWERS_SCHEMA = 1
CANARY_SCHEMA = 1

Style: TypeAlias = Literal["raw", "chat", "thinking"]
Finding: TypeAlias = Literal["repetition", "script", "marker", "empty", "endless"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer and what the model makes of the known-good ones.

    ids: generated token ids, the ending one included. text: all of them but the ending one, special tokens spelled out.
    known_nats: mean NLL per token of the base's answer to this prompt, teacher-forced (in the base's own record: of its
        own answer); None where it is not finite, or where the base said nothing.
    reference_nats: the same for the prompt's fixed reference answer; None where it has none.
    """

    prompt: str
    ids: tuple[int, ...]
    text: str
    ended: bool
    known_nats: float | None
    reference_nats: float | None


@dataclass(frozen=True, slots=True)
class Said:
    """All answers under one condition, in the order of the prompts."""

    style: Style
    bos: bool
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """One model on all prompts under all conditions, and what must agree before two of these are compared.

    tokenizer_hash, template_hash, end_ids: of the checkpoint. prompts_hash, settings_hash, dtype, stack: of the run.
    markers: special tokens as they are spelled. skipped: condition → why it was left out.
    """

    fingerprint: str
    model: str
    tokenizer_hash: str
    template_hash: str
    end_ids: tuple[int, ...]
    prompts_hash: str
    settings_hash: str
    dtype: str
    stack: Mapping[str, str]
    markers: tuple[str, ...]
    skipped: Mapping[str, str]
    said: tuple[Said, ...]


@dataclass(frozen=True, slots=True)
class Signs:
    """What the detectors saw in one answer; see `gemcut.canary.detect`. Shares are from 0 to 1."""

    tokens: int
    loop_period: int  # tokens; 0: the answer does not end in a loop
    distinct4: float
    zlib_ratio: float
    foreign_letters: int
    foreign_share: float
    markers: tuple[str, ...]
    ended: bool
    empty: bool
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """One prompt under one condition: both raw answers, both sets of signs, what is new in the candidate.

    divergence: index of the first generated token that differs; None: the answers are equal.
    """

    style: Style
    bos: bool
    prompt: str
    base_text: str
    candidate_text: str
    base: Signs
    candidate: Signs
    new: tuple[Finding, ...]
    divergence: int | None
    base_nats: float | None
    candidate_nats: float | None


@dataclass(frozen=True, slots=True)
class ConditionVerdict:
    """One condition. Shares are of its prompts, with Wilson intervals; ratios with intervals over prompts.

    base_sound: few enough of the base's own answers are broken that the candidate's can be held against them.
    mended: prompts where the base's answer is broken and the candidate's is not.
    nll_ratio: NLL of the base's answers under the candidate by that under the base; None where nothing can be compared.
    reference_ratio: the same for the fixed reference answers.
    """

    style: Style
    bos: bool
    prompts: int
    base_broken: Estimate
    candidate_broken: Estimate
    newly_broken: Estimate
    mended: int
    identical: int
    median_divergence: float | None
    ended_base: int
    ended_candidate: int
    nll_ratio: Estimate | None
    reference_ratio: Estimate | None
    base_sound: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """Does the candidate still talk? Not `passed` when any condition has a reason, or the base is nowhere sound."""

    base_fingerprint: str
    candidate_fingerprint: str
    base: str
    candidate: str
    prompts_hash: str
    settings_hash: str
    settings: Mapping[str, Json]
    dtype: str
    stack: Mapping[str, str]
    passed: bool
    base_sound: bool
    skipped: Mapping[str, str]
    conditions: tuple[ConditionVerdict, ...]
    answers: tuple[AnswerVerdict, ...]


def condition_name(style: Style, bos: bool) -> str:
    """What people and messages call a condition."""
    return f"{style}, {'BOS' if bos else 'no BOS'}"


# ---------------------------------------------------------------- answers


def save_answers(answers: Answers, path: Path) -> None:
    """Write the answers of one model, one line of canonical JSON."""
    value = {"schema": ANSWERS_SCHEMA, **cast("dict[str, Json]", to_json(answers))}
    write_bytes(path, canonical_json(value) + b"\n")


def load_answers(path: Path) -> Answers:
    """Read the answers of one model.

    Raises:
        UsageError: there is no such file.
        CheckpointError: not whole, wrong types, another schema, a condition or a prompt twice.
    """
    f = open_record(path, "answers file", ANSWERS_SCHEMA)
    answers = Answers(
        fingerprint=f.digest("fingerprint"),
        model=f.text("model"),
        tokenizer_hash=f.text("tokenizer_hash"),
        template_hash=f.text("template_hash"),
        end_ids=f.counts("end_ids"),
        prompts_hash=f.digest("prompts_hash"),
        settings_hash=f.digest("settings_hash"),
        dtype=f.text("dtype"),
        stack=_texts(f.child("stack")),
        markers=f.texts("markers"),
        skipped=_texts(f.child("skipped")),
        said=f.children("said", _read_said),
    )
    f.done()
    seen = [(said.style, said.bos) for said in answers.said]
    if len(set(seen)) != len(seen):
        f.refuse("said", "a condition a second time", "every condition once")
    return answers


def _read_said(f: Fields) -> Said:
    said = Said(_style(f), _flag(f, "bos"), f.children("answers", _read_answer))
    f.done()
    names = [answer.prompt for answer in said.answers]
    if not names or len(set(names)) != len(names):
        f.refuse("answers", f"{len(names)} answers to {len(set(names))} prompts", "every prompt once")
    return said


def _read_answer(f: Fields) -> Answer:
    answer = Answer(
        prompt=f.text("prompt", empty=False),
        ids=f.counts("ids"),
        text=f.text("text"),
        ended=_flag(f, "ended"),
        known_nats=_optional(f, "known_nats"),
        reference_nats=_optional(f, "reference_nats"),
    )
    f.done()
    return answer


# ---------------------------------------------------------------- verdicts


def save_canary(result: CanaryResult, path: Path) -> None:
    """Write `canary.json`."""
    write_json(path, {"schema": CANARY_SCHEMA, **cast("dict[str, Json]", to_json(result))})


def load_canary(path: Path) -> CanaryResult:
    """Read `canary.json`.

    Raises:
        UsageError: there is no such file.
        CheckpointError: wrong types, another schema, or a verdict that its own reasons contradict.
    """
    f = open_record(path, "canary record", CANARY_SCHEMA)
    result = CanaryResult(
        base_fingerprint=f.digest("base_fingerprint"),
        candidate_fingerprint=f.digest("candidate_fingerprint"),
        base=f.text("base"),
        candidate=f.text("candidate"),
        prompts_hash=f.digest("prompts_hash"),
        settings_hash=f.digest("settings_hash"),
        settings=f.mapping("settings"),
        dtype=f.text("dtype"),
        stack=_texts(f.child("stack")),
        passed=_flag(f, "passed"),
        base_sound=_flag(f, "base_sound"),
        skipped=_texts(f.child("skipped")),
        conditions=f.children("conditions", _read_condition),
        answers=f.children("answers", _read_verdict),
    )
    f.done()
    if result.passed != (result.base_sound and not any(c.reasons for c in result.conditions)):
        raise CheckpointError(
            "the verdict and its reasons disagree", where=path.name, hint="the record was edited: run the canary again"
        )
    return result


def _read_condition(f: Fields) -> ConditionVerdict:
    out = ConditionVerdict(
        style=_style(f),
        bos=_flag(f, "bos"),
        prompts=f.count("prompts"),
        base_broken=_estimate(f.child("base_broken")),
        candidate_broken=_estimate(f.child("candidate_broken")),
        newly_broken=_estimate(f.child("newly_broken")),
        mended=f.count("mended"),
        identical=f.count("identical"),
        median_divergence=_optional(f, "median_divergence"),
        ended_base=f.count("ended_base"),
        ended_candidate=f.count("ended_candidate"),
        nll_ratio=None if f.raw("nll_ratio") is None else _estimate(f.child("nll_ratio")),
        reference_ratio=None if f.raw("reference_ratio") is None else _estimate(f.child("reference_ratio")),
        base_sound=_flag(f, "base_sound"),
        reasons=f.texts("reasons"),
    )
    f.done()
    return out


def _read_verdict(f: Fields) -> AnswerVerdict:
    out = AnswerVerdict(
        style=_style(f),
        bos=_flag(f, "bos"),
        prompt=f.text("prompt", empty=False),
        base_text=f.text("base_text"),
        candidate_text=f.text("candidate_text"),
        base=_signs(f.child("base")),
        candidate=_signs(f.child("candidate")),
        new=_findings(f, "new"),
        divergence=None if f.raw("divergence") is None else f.count("divergence"),
        base_nats=_optional(f, "base_nats"),
        candidate_nats=_optional(f, "candidate_nats"),
    )
    f.done()
    return out


def _signs(f: Fields) -> Signs:
    out = Signs(
        tokens=f.count("tokens"),
        loop_period=f.count("loop_period"),
        distinct4=f.number("distinct4"),
        zlib_ratio=f.number("zlib_ratio"),
        foreign_letters=f.count("foreign_letters"),
        foreign_share=f.number("foreign_share"),
        markers=f.texts("markers"),
        ended=_flag(f, "ended"),
        empty=_flag(f, "empty"),
        findings=_findings(f, "findings"),
    )
    f.done()
    return out


def _findings(f: Fields, key: str) -> tuple[Finding, ...]:
    out = f.texts(key, distinct=True)
    for name in out:
        if name not in get_args(Finding):
            f.refuse(key, name, ", ".join(get_args(Finding)))
    return cast("tuple[Finding, ...]", out)


def _style(f: Fields) -> Style:
    style = f.text("style")
    if style not in get_args(Style):
        f.refuse("style", style, ", ".join(get_args(Style)))
    return cast(Style, style)


def _flag(f: Fields, key: str) -> bool:
    value = f.raw(key)
    if not isinstance(value, bool):
        f.refuse(key, value, "true or false")
    return value


def _optional(f: Fields, key: str) -> float | None:
    return None if f.raw(key) is None else f.number(key)


def _texts(f: Fields) -> dict[str, str]:
    return {f.check_text("a key", key): f.text(key) for key in f.names()}


def _estimate(f: Fields) -> Estimate:
    out = Estimate(value=f.number("value"), low=f.number("low"), high=f.number("high"), n=f.count("n"))
    f.done()
    return out
