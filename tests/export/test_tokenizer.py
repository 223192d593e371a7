"""The vocabulary of a GGUF file: what the converter writes, and typed errors for every kind of broken folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemcut.errors import CheckpointError
from gemcut.export.tokenizer import BYTE, CONTROL, NORMAL, USER_DEFINED, tokenizer_metadata
from gemcut.families.gguf import Value
from tiny import VOCABULARY, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"sep_token_id": 9}, "eos_token_id": [1, 6]}))
    return tmp_path


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def test_types_ids_and_order(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", lambda c: c.update(add_eos_token=False, sot_token="<|turn>"))
    edit(folder, "tokenizer.json", lambda t: next(a for a in t["added_tokens"] if a["content"] == "<mask>").update(
        special=False))  # fmt: skip
    found = tokenizer_metadata(folder, rows=VOCABULARY)
    types = found["tokenizer.ggml.token_type"].value
    tokens = found["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, tuple)
    assert isinstance(types, tuple)
    assert len(tokens) == len(types) == VOCABULARY
    kind = dict(zip(tokens, types, strict=True))
    assert kind["<bos>"] == kind["<|turn>"] == CONTROL
    assert kind["<mask>"] == CONTROL, "named by the config alone"
    assert kind["<turn|>"] == CONTROL, "marked in tokenizer.json alone; llama.cpp splits what is NORMAL"
    assert kind["<unused3>"] == NORMAL
    assert kind["<|channel>"] == kind["<channel|>"] == USER_DEFINED
    assert kind["<0x0A>"] == BYTE
    keys = [key.removeprefix("tokenizer.ggml.") for key in found]
    assert keys == ["model", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id",
                    "unknown_token_id", "padding_token_id", "mask_token_id", "seperator_token_id", "add_eos_token",
                    "tokenizer.chat_template", "add_space_prefix", "add_bos_token"]  # fmt: skip
    assert found["tokenizer.ggml.add_bos_token"] == Value("bool", True)
    assert found["tokenizer.ggml.seperator_token_id"] == Value("u32", 9)


def test_merges_in_both_spellings(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda t: t["model"].update(merges=["e t", "t a"]))
    assert tokenizer_metadata(folder)["tokenizer.ggml.merges"] == Value("str", ("e t", "t a"))
    edit(folder, "tokenizer.json", lambda t: t["model"].update(merges=[["e", "t"], [" ", "a b"]]))
    assert tokenizer_metadata(folder)["tokenizer.ggml.merges"] == Value("str", ("e t", "\u0120 a\u0120b"))


def test_where_the_chat_template_comes_from(folder: Path) -> None:
    key = "tokenizer.chat_template"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert tokenizer_metadata(folder)[key].value == "from jinja"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool-use.jinja").write_text("tools")
    found = tokenizer_metadata(folder)
    assert found[key].value == "from jinja"
    assert found[f"{key}.tool_use"].value == "tools"
    assert found["tokenizer.chat_templates"].value == ("tool_use",)
    edit(folder, "tokenizer_config.json", lambda c: c.update(chat_template="from config"))
    assert tokenizer_metadata(folder)[key].value == "from config"
    edit(folder, "tokenizer_config.json", lambda c: c.pop("chat_template"))
    (folder / "chat_template.jinja").unlink()
    assert key not in tokenizer_metadata(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert tokenizer_metadata(folder)[key].value == "from json"


def test_bos_of_a_post_processor_keeps_its_place_and_is_always_true(folder: Path) -> None:
    token = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    post = {"type": "TemplateProcessing", "single": [token, a], "pair": [token, a, token, b]}
    edit(folder, "tokenizer.json", lambda t: t.update(post_processor=post))
    edit(folder, "tokenizer_config.json", lambda c: c.update(add_bos_token=False))
    found = tokenizer_metadata(folder)
    assert list(found)[-4:] == ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_sep_token",
                                "tokenizer.chat_template", "tokenizer.ggml.add_space_prefix"]  # fmt: skip
    assert found["tokenizer.ggml.add_bos_token"].value is True
    assert found["tokenizer.ggml.add_sep_token"].value is False


def vocab(tokenizer: dict[str, Any]) -> dict[str, int]:
    inner = tokenizer["model"]["vocab"]
    assert isinstance(inner, dict)
    return inner


def swap_bos_away(tokenizer: dict[str, Any]) -> None:
    vocab(tokenizer)["<other>"] = vocab(tokenizer).pop("<bos>")
    tokenizer["added_tokens"][2]["content"] = "<other>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: vocab(t).update({"<|turn>": 4}), "two ids"),
        (lambda t: vocab(t).update({"▁": 300}), "same id"),
        (lambda t: vocab(t).update({"▁": 99999}), "out of range"),
        (lambda t: vocab(t).update({"▁": -1}), "out of range"),
        (lambda t: vocab(t).update({"▁": True}), "out of range"),
        (lambda t: vocab(t).pop("<unused3>"), "out of range"),
        (lambda t: vocab(t).clear(), "no vocabulary"),
        (lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 500}), "repeated"),
        (lambda t: t["added_tokens"].append({"id": 0, "content": "<new>"}), "repeated"),
        (lambda t: t["added_tokens"].append({"content": "<new>"}), "without content and id"),
        (lambda t: t.update(added_tokens="x"), "no list"),
        (lambda t: t["model"].update(type="Unigram"), "no BPE"),
        (lambda t: t["model"].update(byte_fallback=False), "no BPE"),
        (lambda t: t["model"].update(merges=["a b c"]), "no pair"),
        (lambda t: t["model"].update(merges=[["a", 3]]), "no pair"),
        (lambda t: t["model"].pop("merges"), "no merges"),
        (lambda t: t["model"].update(merges=[]), "no merges"),
        (swap_bos_away, "lacks a special token"),
    ],
)
def test_broken_vocabularies(folder: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    edit(folder, "tokenizer.json", change)
    with pytest.raises(CheckpointError, match=said):
        tokenizer_metadata(folder)


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_no_file_says_which_token_begins_or_ends(folder: Path, kind: str) -> None:
    edit(folder, "tokenizer_config.json", lambda c: c.pop(f"{kind}_token"))
    with pytest.raises(CheckpointError, match=rf"no file says which token is {kind.upper()}") as refused:
        tokenizer_metadata(folder)
    assert refused.value.where == "tokenizer_config.json"
    assert f'"{kind}_token": "<{kind}>"' in str(refused.value)
    edit(folder, "config.json", lambda c: c.update({f"{kind}_token_id": [1, 6]}))
    with pytest.raises(CheckpointError, match=rf"{kind}_token_id \[1, 6\]"):
        tokenizer_metadata(folder)
    edit(folder, "config.json", lambda c: c.update({f"{kind}_token_id": True}))
    with pytest.raises(CheckpointError, match="no file says"):
        tokenizer_metadata(folder)
    edit(folder, "config.json", lambda c: c.update({f"{kind}_token_id": 2}))
    assert tokenizer_metadata(folder)[f"tokenizer.ggml.{kind}_token_id"] == Value("u32", 2)


def test_a_special_token_of_the_vocabulary_alone_keeps_its_id(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda t: t.update(added_tokens=[]))
    found = tokenizer_metadata(folder)
    tokens = found["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, tuple)
    assert found["tokenizer.ggml.eos_token_id"].value == tokens.index("<eos>")


def test_broken_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "tokenizer.json").read_text()
    broken = {whole[: len(whole) // 2]: "not valid JSON", "[]": "not a JSON object", "\ud800": "not valid JSON",
              whole.replace('"<0x41>"', '"<0x42>"'): "is repeated"}  # fmt: skip
    for text, said in broken.items():
        (folder / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=said):
            tokenizer_metadata(folder)
    (folder / "tokenizer.json").write_text(whole)
    with monkeypatch.context() as small:
        small.setattr("gemcut.export.tokenizer._MAX_FILE_BYTES", 1000)
        with pytest.raises(CheckpointError, match="too large"):
            tokenizer_metadata(folder)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=f"has no {re.escape(file)}"):
            tokenizer_metadata(folder)


def test_sizes_and_ids_must_fit(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="different sizes"):
        tokenizer_metadata(folder, rows=VOCABULARY + 64)
    edit(folder, "config.json", lambda c: c.update(cls_token_id=VOCABULARY))
    with pytest.raises(CheckpointError, match="outside the vocabulary"):
        tokenizer_metadata(folder)
