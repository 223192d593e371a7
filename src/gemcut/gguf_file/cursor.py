"""Little-endian numbers and strings off the front of a file that may lie about every one of them."""

from __future__ import annotations

import os
import struct
from typing import NoReturn

from gemcut.errors import CheckpointError

MAX_HEADER_BYTES = 256 << 20  # ten times the largest vocabulary and merge list known; a real header is under 32 MiB
MAX_MEMBERS = 4 << 20  # of all arrays together; in Python each takes some 60 bytes. Gemma's vocabulary has 1.3 million
MAX_TEXT_BYTES = 16 << 20  # of one string; the longest chat templates have some 100 KiB
_FIRST_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")

# number formats of metadata and of arrays, little endian
SCALARS = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "u64": "Q", "i64": "q",
    "f32": "f", "f64": "d",
}  # fmt: skip


class Cursor:
    """A position in the header of an open file; memory grows with what was really read, never with what is claimed."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self.at = 0
        self.size_bytes = os.fstat(fd).st_size
        self._fd = fd
        self._limit = min(self.size_bytes, MAX_HEADER_BYTES)
        self._held = b""
        self._members = 0

    def bad(self, what: str, got: object = None, wanted: object = None, *, item: str = "") -> NoReturn:
        """Raise, naming the file and the entry."""
        raise CheckpointError(
            what, where=f"{shown(item)} in {self.name}" if item else self.name, got=got, wanted=wanted
        )

    def _hold(self, stop: int, what: str) -> None:
        """Have the bytes up to `stop`; reads at least twice what it had, so that the number of reads stays small."""
        if stop <= len(self._held):
            return
        if stop > self._limit:
            if stop <= self.size_bytes:
                self.bad("the header is too large", got=f"{what} ends at byte {stop}", wanted=f"at most {self._limit}")
            self.bad(f"the file ends inside {what}", got=f"{self.size_bytes} bytes", wanted=f"{stop} or more")
        aim = min(self._limit, max(stop, 2 * len(self._held), _FIRST_BYTES))
        parts = [self._held]
        have = len(self._held)
        while have < aim:
            part = os.pread(self._fd, aim - have, have)
            if not part:
                break
            parts.append(part)
            have += len(part)
        self._held = b"".join(parts)
        if have < stop:
            self.bad(f"the file ends inside {what}", got=f"{have} bytes", wanted=f"{stop} or more")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self._hold(self.at + count, what)
        self.at += count
        return self._held[self.at - count : self.at]

    def number(self, kind: str, what: str) -> int | float:
        """One scalar, by its name in `SCALARS`."""
        form = "<" + SCALARS[kind]
        value: int | float = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def count(self, kind: str, what: str) -> int:
        """One unsigned integer."""
        return int(self.number(kind, what))

    def text(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        return self.texts(1, what)[0]

    def _members_fit(self, count: int, size: int, what: str) -> None:
        self._members += count
        if count * size > self._limit - self.at or self._members > MAX_MEMBERS:
            self.bad(f"{what} claims more members than the file can hold", got=count)

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings in a row; the loop over a vocabulary of 262,144."""
        self._members_fit(count, _LENGTH.size, what)
        out: list[str] = []
        held, at, have = self._held, self.at, len(self._held)
        unpack = _LENGTH.unpack_from
        try:
            for _ in range(count):
                if at + 8 > have:
                    self._hold(at + 8, what)
                    held, have = self._held, len(self._held)
                start = at + 8
                at = start + unpack(held, at)[0]
                if at > have:
                    if at - start > MAX_TEXT_BYTES and at <= self.size_bytes:
                        self.bad(f"{what} has too long a string", got=f"{at - start} bytes")
                    self._hold(at, what)
                    held, have = self._held, len(self._held)
                out.append(str(held[start:at], "utf-8"))
        except UnicodeDecodeError:
            self.bad(f"{what} is not UTF-8")
        self.at = at
        return out

    def numbers(self, kind: str, count: int, what: str) -> tuple[int, ...] | tuple[float, ...]:
        """`count` scalars in a row."""
        size = struct.calcsize("<" + SCALARS[kind])
        self._members_fit(count, size, what)
        values: tuple[int, ...] | tuple[float, ...]
        values = struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size, what))
        return values


def shown(name: str) -> str:
    """A name from outside as a message can print it."""
    return name[:120].encode("ascii", "backslashreplace").decode()
