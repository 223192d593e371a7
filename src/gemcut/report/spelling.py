"""Numbers and values as people read them: units, true minus signs, the digits that an interval supports."""

from __future__ import annotations

import math

from gemcut.types import Estimate, Json


def size(size_bytes: int) -> str:
    """Bytes in the binary unit that keeps one to four digits before the point: `10.17 GiB`, `23.4 MiB`, `512 B`."""
    value = float(abs(size_bytes))
    sign = "−" if size_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" else 2 if value < 100 else 1
    return f"{sign}{value:.{digits}f} {unit}"


def count(number: int) -> str:
    """A whole number with thousands separators."""
    return f"{number:,}"


def parameters(number: int) -> str:
    """A parameter count with three significant digits and its unit: `25.2 B`, `31.1 M`, `512`."""
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)


def change(before: int, after: int) -> str:
    """Relative change of an exact quantity: `−22.3 %`."""
    if before == 0:
        return "new" if after else "±0 %"
    percent = 100 * (after - before) / before
    return "±0 %" if after == before else signed(percent, 1) + " %"


def signed(value: float, digits: int) -> str:
    """A number with a true minus sign, or a plus."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return ("−" if value < 0 else "+") + text


def decimals(low: float, high: float, value: float) -> int:
    """Decimals that show the half width of an interval with one digit, two where that digit is 1."""
    half = (high - low) / 2
    if half <= 0 or not math.isfinite(half):
        half = abs(value) / 1000 or 1e-3
    exponent = math.floor(math.log10(half))
    leading = half / 10**exponent
    return min(12, max(0, -exponent + (1 if leading < 2 else 0)))


def interval(estimate: Estimate, *, scale: float = 1.0, sign: bool = False) -> str:
    """`0.031 [0.028, 0.034]`: an estimate and its 95 % interval, without the n that the column or caption states."""
    if estimate.value == estimate.low == estimate.high == 0:
        return "0 [0, 0]"
    digits = decimals(estimate.low * scale, estimate.high * scale, estimate.value * scale)

    def number(value: float) -> str:
        value *= scale
        text = f"{abs(value):.{digits}f}"
        if sign:
            return signed(value, digits)
        return ("−" if value < 0 and float(text) != 0 else "") + text

    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def estimate(value: Estimate, units: str, *, scale: float = 1.0, sign: bool = False) -> str:
    """`0.031 [0.028, 0.034] (n = 240 chunks)`."""
    return f"{interval(value, scale=scale, sign=sign)} (n = {count(value.n)} {units})"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson interval of a share of n trials. Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209."""
    if n <= 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def json_text(value: Json) -> str:
    """A recipe or config value in one line."""
    if isinstance(value, dict):
        pairs = (
            (key, f"({json_text(item)})" if isinstance(item, dict) else json_text(item)) for key, item in value.items()
        )
        return ", ".join(f"{key} = {text}" for key, text in pairs) or "none"
    if isinstance(value, list):
        text = ", ".join(json_text(item) for item in value[:12])
        return f"[{text}{', …' if len(value) > 12 else ''}]"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
