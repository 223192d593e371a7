"""`canary.json` and the cached answers of a base: what two models said to the same prompts, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

from gemcut.errors import CheckpointError
from gemcut.records.fields import Fields, open_record, to_json
from gemcut.records.typed import read
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
    hashes = {name: f.digest(name) for name in ("fingerprint", "prompts_hash", "settings_hash")}
    answers = read(Answers, f, said=f.children("said", _read_said), **hashes)
    seen = [(said.style, said.bos) for said in answers.said]
    if len(set(seen)) != len(seen):
        f.refuse("said", "a condition a second time", "every condition once")
    return answers


def _read_said(f: Fields) -> Said:
    said = read(Said, f)
    names = [answer.prompt for answer in said.answers]
    if not names or "" in names or len(set(names)) != len(names):
        f.refuse("answers", f"{len(names)} answers to {len(set(names))} prompts", "every prompt once")
    return said


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
    names = ("base_fingerprint", "candidate_fingerprint", "prompts_hash", "settings_hash")
    result = read(CanaryResult, f, **{name: f.digest(name) for name in names})
    if result.passed != (result.base_sound and not any(c.reasons for c in result.conditions)):
        raise CheckpointError(
            "the verdict and its reasons disagree", where=path.name, hint="the record was edited: run the canary again"
        )
    return result
