"""How this package says numbers and values to people."""

import json
from typing import Any

_LONGEST = 200


def in_words(num_bytes: float, digits: int = 2, step: int = 1024) -> str:
    """Bytes in the largest unit that leaves a number of one or more.

    Args:
        num_bytes: how many.
        digits: behind the point.
        step: 1024 for memory (KiB, MiB, GiB), 1000 for what is sent (kB, MB, GB).
    """
    units = ("bytes", "kB", "MB", "GB") if step == 1000 else ("bytes", "KiB", "MiB", "GiB")
    power = next((power for power in (3, 2, 1) if num_bytes >= step**power), 0)
    return f"{num_bytes / step**power:,.{digits}f} {units[power]}"


def shown(value: Any) -> str:
    """A value that a user wrote, as JSON writes it: its start, where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
        if not text.isprintable():
            text = json.dumps(value, default=repr)
    except (TypeError, RecursionError):  # keys that JSON has not; deeper than Python goes
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits, alone or inside
        return f"a {type(value).__name__} with a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def as_word(name: str) -> str:
    """A key that a user wrote, as an error names it: on one line, printable on every terminal, blanks seen."""
    short = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    if short != short.strip():
        return json.dumps(short)
    return short if short.isprintable() else ascii(short)
