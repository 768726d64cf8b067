"""What programs, ds_configs and dashboards depend on: a change here needs a line in the CHANGELOG."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

import deepspeed_alst
from deepspeed_alst.cli.main import build_parser
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.monitoring.metrics import Report

GOLDEN = Path(__file__).parent / "public_interface.json"


def keys_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON keys of a block with their defaults; of a block inside, its own keys."""
    found: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        blocks = [each for each in parts if isinstance(each, type) and issubclass(each, BaseModel)]
        default = field.get_default(call_default_factory=True)
        found[name] = {"default": None if isinstance(default, BaseModel) else default}
        found[name] |= {"keys": keys_of(blocks[0])} if blocks else {}
    return found


def interface() -> dict[str, Any]:
    """The public names, JSON keys, exceptions, commands and metrics, as they are."""
    names = {name: getattr(deepspeed_alst, name) for name in deepspeed_alst.__all__ if name != "__version__"}
    options = {}
    (commands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        actions = [each for each in command._actions if each.dest != "help"]
        options[name] = sorted(word for each in actions for word in each.option_strings or [each.dest])
    return {
        "exceptions": {
            name: [base.__name__ for base in value.__mro__[1:-1]]
            for name, value in names.items()
            if isinstance(value, type)
        },
        "functions": sorted(name for name, value in names.items() if not isinstance(value, type)),
        "keys": keys_of(AlstConfig),
        "commands": options,
        "metrics": sorted(field.name for field in dataclasses.fields(Report)),
    }


def test_the_public_interface_is_what_was_released():
    assert interface() == json.loads(GOLDEN.read_text(encoding="utf-8"))
