"""Validators of values of the ds_config."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deepspeed_alst.formatting import shown


def number_of(unit: str, *words: str | None) -> BeforeValidator:
    """Return a validator of a positive integer, which JSON may write as 5e8, or one of some words."""

    def check(value: Any) -> Any:
        if value in words:
            return value
        if type(value) not in (int, float) or not 1 <= value < 2**63 or value != int(value):
            raise ValueError(f"must be a positive number of {unit}" + (', or "auto"' if words else ""))
        return int(value)

    accepted = Annotated[int, Field(ge=1)] | Literal[words]  # type: ignore[valid-type]
    return BeforeValidator(check, json_schema_input_type=accepted) if words else BeforeValidator(check)


def one_of(*values: str | bool) -> BeforeValidator:
    """Return a validator of some words and switches, which takes no number for a switch."""

    def check(value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in values):
            raise ValueError(f"use {', '.join(map(shown, values[:-1]))}, or {shown(values[-1])}")
        return value

    return BeforeValidator(check)
