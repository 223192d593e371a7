from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.records.editing import edited

from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.records.canary import (
    Answer,
    Answers,
    AnswerVerdict,
    CanaryResult,
    ConditionVerdict,
    Said,
    Signs,
    condition_name,
    load_answers,
    load_canary,
    save_answers,
    save_canary,
)
from gemcut.types import Estimate

SHA = "0" * 64
SAID = Said(
    "chat", True, (Answer("a", (5, 6, 1), "額 \u2028<|turn>", True, 0.25, None), Answer("b", (), "", False, None, 2.0))
)
ANSWERS = Answers(
    SHA, "base", "t", "j", (1,), SHA, SHA, "float32", {"torch": "2"}, ("<bos>",), {"raw, BOS": "why"}, (SAID,)
)
SIGNS = Signs(3, 0, 1.0, 1.5, 0, 0.0, (), True, False, ())
LOOPS = Signs(48, 2, 0.1, 9.0, 0, 0.0, ("<|turn>",), False, False, ("repetition", "marker"))
E = Estimate(0.1, 0.05, 0.2, 24)
CONDITION = ConditionVerdict("chat", True, 24, E, E, E, 1, 3, 2.5, 10, 2, E, None, True, ("too many",))
VERDICT = AnswerVerdict("chat", True, "a", "x", "yyy", SIGNS, LOOPS, ("repetition", "marker"), 1, 0.5, None)
RESULT = CanaryResult(
    SHA, "1" * 64, "base", "cut", SHA, SHA, {"limits": {"nll_ratio": 2.0}}, "float32", {"torch": "2"}, False, True, {},
    (CONDITION,), (VERDICT,),
)  # fmt: skip


def test_answers_round_trip(tmp_path: Path) -> None:
    save_answers(ANSWERS, tmp_path / "answers.json")
    assert load_answers(tmp_path / "answers.json") == ANSWERS


def test_result_round_trip(tmp_path: Path) -> None:
    save_canary(RESULT, tmp_path / "canary.json")
    assert load_canary(tmp_path / "canary.json") == RESULT


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("schema",), 99, "newer"),
        (("fingerprint",), "abc", "fingerprint"),
        (("end_ids",), [-1], r"end_ids\[0\]"),
        (("said", 0, "style"), "shout", r"said\[0\].style"),
        (("said", 0, "bos"), 1, r"said\[0\].bos"),
        (("said", 0, "answers"), [], r"said\[0\].answers"),
        (("said", 0, "answers", 1, "prompt"), "a", "every prompt once"),
        (("said", 0, "answers", 0, "ids"), [True], r"ids\[0\]"),
        (("said", 0, "answers", 0, "known_nats"), "0.1", "known_nats"),
        (("said", 0, "answers", 0, "more"), 1, "unknown key"),
        (("stack",), {"torch": 2}, "stack.torch"),
    ],
)
def test_answers_refuse(tmp_path: Path, keys: tuple[Any, ...], value: object, named: str) -> None:
    save_answers(ANSWERS, tmp_path / "answers.json")
    with pytest.raises(CheckpointError, match=named):
        load_answers(edited(tmp_path / "answers.json", keys, value))


def test_answers_refuse_a_condition_twice(tmp_path: Path) -> None:
    save_answers(ANSWERS, tmp_path / "answers.json")
    said = json.loads((tmp_path / "answers.json").read_text())["said"]
    with pytest.raises(CheckpointError, match="second time"):
        load_answers(edited(tmp_path / "answers.json", ("said",), said * 2))


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("schema",), 0, "older"),
        (("passed",), True, "disagree"),
        (("conditions", 0, "reasons"), [], "disagree"),
        (("conditions", 0, "nll_ratio", "value"), float("inf"), "nll_ratio.value"),
        (("answers", 0, "new"), ["dull"], "new"),
        (("answers", 0, "candidate", "loop_period"), -1, "loop_period"),
        (("answers", 0, "divergence"), 1.5, "divergence"),
    ],
)
def test_result_refuses(tmp_path: Path, keys: tuple[Any, ...], value: object, named: str) -> None:
    save_canary(RESULT, tmp_path / "canary.json")
    if keys == ("conditions", 0, "reasons"):
        edited(tmp_path / "canary.json", ("base_sound",), True)
    with pytest.raises(CheckpointError, match=named):
        load_canary(edited(tmp_path / "canary.json", keys, value))


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    bad = Answer("a", (1,), "", True, float("nan"), None)
    broken = Answers(SHA, "b", "t", "j", (1,), SHA, SHA, "float32", {}, (), {}, (Said("raw", True, (bad,)),))
    with pytest.raises(QualityError, match="not finite"):
        save_answers(broken, tmp_path / "answers.json")
    assert not (tmp_path / "answers.json").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no answers file"):
        load_answers(tmp_path / "answers.json")


def test_names_of_conditions() -> None:
    assert condition_name("raw", True) == "raw, BOS"
    assert condition_name("thinking", False) == "thinking, no BOS"
