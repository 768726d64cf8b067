"""``ds_alst keys``: configuration reference in Markdown, from the fields of ``config/schema.py``."""

import argparse
import json
from collections.abc import Iterator

from deepspeed_alst.cli.schema import json_schema

_HEAD = """# Configuration

The keys of a ds_config by their paths; `ds_alst keys` prints this page. For completion and checks in an editor, add
`"$schema": "alst.schema.json"` to the ds_config, with the path of the file that `ds_alst schema` prints.

| key | type | default | meaning |
|---|---|---|---|"""


def run(arguments: argparse.Namespace) -> int:
    """Print the reference; return 0."""
    print(_HEAD, *_rows("", schema := json_schema(), schema["$defs"]), sep="\n")
    return 0


def _rows(path: str, block: dict, blocks: dict) -> Iterator[str]:
    """Yield a row for each key of a block, each followed by the rows of the block inside it."""
    for name, field in block["properties"].items():
        parts = field.get("anyOf", [field])
        default, meaning = field.get("default", {}), " ".join(field["description"].replace("``", "`").split())
        yield f"| `{path}{name}` | {', '.join(map(_type, parts))} | `{json.dumps(default)}` | {meaning} |"
        for inner in (each["$ref"].rpartition("/")[2] for each in parts if "$ref" in each):
            yield from _rows(f"{path}{name}.", blocks[inner], blocks)


def _type(field: dict) -> str:
    """Return a JSON type with its lower bound, or the values that are allowed."""
    values = field.get("enum", [field["const"]] if "const" in field else [])
    least = f" >= {field['minimum']}" if "minimum" in field else ""
    return ", ".join(f"`{json.dumps(value)}`" for value in values) or field.get("type", "object") + least
