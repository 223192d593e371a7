"""One training document: its class, its identity and its text or messages."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CLASSES: tuple[str, ...] = ("code", "prose", "math", "logic", "science", "creative")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """Either `text` or `messages` is set; `key` names the document for the split."""

    label: str
    key: str
    text: str = ""
    messages: tuple[Message, ...] = ()

    def digest(self) -> str:
        """SHA-256 of what the model would see; equal documents have equal digests."""
        return hashlib.sha256(rendered(self).encode()).hexdigest()


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: `int(sha256(key)[:8]) / 2**32`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32


def rendered_chat(messages: Sequence[Message], *, generation: bool = False) -> str:
    """The chat template in Python; a test holds it equal to `chat_template.jinja`.

    Thinking is announced in the system turn exactly when an answer carries reasoning.
    """
    thinking = any(message.get("reasoning_content") for message in messages)
    parts = ["<bos>"]
    system = messages[0]["content"].strip() if messages and messages[0]["role"] == "system" else ""
    if thinking or system:
        parts.append("<|turn>system\n" + ("<|think|>\n" if thinking else "") + system + "<turn|>\n")
    for message in messages:
        if message["role"] == "system":
            continue
        role = "model" if message["role"] == "assistant" else message["role"]
        parts.append(f"<|turn>{role}\n")
        reasoning = message.get("reasoning_content", "")
        if role == "model" and reasoning:
            parts.append(f"<|channel>thought\n{reasoning.strip()}\n<channel|>")
        parts.append(message["content"].strip() + "<turn|>\n")
    if generation:
        parts.append("<|turn>model\n")
    return "".join(parts)


def rendered(document: Document) -> str:
    """The exact string that is tokenised: one literal `<bos>` first, then chat turns or plain text."""
    if document.messages:
        return rendered_chat(document.messages)
    return f"<bos>{document.text}"
