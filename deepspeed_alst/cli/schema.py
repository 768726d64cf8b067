"""``ds_alst schema``: JSON Schema of this package's keys in a ds_config, for completion and checks in an editor."""

import argparse
import json
from typing import Any

from deepspeed_alst.config.config_file import TOP_KEYS
from deepspeed_alst.config.schema import BLOCKS, SWITCHES, AlstConfig


def run(arguments: argparse.Namespace) -> int:
    """Print the schema, which checks this package's keys and accepts all others; return 0."""
    schema = json_schema()
    schema["properties"] |= {name: schema["$defs"]["AlstBlockConfig"]["properties"][name] for name in TOP_KEYS}
    print(json.dumps(schema | {"additionalProperties": True}, indent=2))
    return 0


def json_schema() -> dict[str, Any]:
    """Return pydantic's JSON Schema, with the values that a switch takes before they become an object."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | AlstConfig.model_json_schema()
    for name, words in SWITCHES.items():
        field = schema["$defs"]["AlstBlockConfig"]["properties"][name]
        inner = [{"$ref": f"#/$defs/{BLOCKS[name].__name__}"}] if name in BLOCKS else []
        field["anyOf"] = [{"type": "boolean"}, *({"const": word} for word in words), *inner]
        field["default"] = field["default"] or False
    return schema
