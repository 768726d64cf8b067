"""Formatting of numbers and values in messages."""

import json
from typing import Any

_LONGEST = 200


def format_bytes(num_bytes: float, digits: int = 2) -> str:
    """Format bytes in the largest binary unit that gives a value of at least one."""
    power = next((power for power in (3, 2, 1) if num_bytes >= 1024**power), 0)
    return f"{num_bytes / 1024**power:,.{digits}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def shown(value: Any) -> str:
    """Format a user's value as JSON, truncated if it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
        if not text.isprintable():
            text = json.dumps(value, default=repr)
    except (TypeError, RecursionError):  # keys that JSON cannot have; beyond the recursion limit
        text = repr(value)
    except ValueError:  # Python formats no integer of more than 4300 digits, not even a nested one
        return f"a {type(value).__name__} with a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def as_word(name: str) -> str:
    """Format a user's key for an error: one line, printable on every terminal, with visible blanks."""
    short = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    if short != short.strip():
        return json.dumps(short)
    return short if short.isprintable() else ascii(short)
