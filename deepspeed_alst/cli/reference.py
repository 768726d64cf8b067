"""``ds_alst keys``, ``schema`` and ``recipes``: reference and JSON Schema of the keys, and the ready ds_configs."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed_alst.config.config_file import TOP_KEYS
from deepspeed_alst.config.schema import BLOCKS, SWITCHES, AlstConfig
from deepspeed_alst.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
_RECIPE = re.compile(r"^\| `([^`]+)\.json` \| ([^|]+) \| ([^|]+) \|", re.M)
_HEAD = """# Configuration

The keys of a ds_config by their paths; `ds_alst keys` prints this page. For completion and checks in an editor, add
`"$schema": "alst.schema.json"` to the ds_config, with the path of the file that `ds_alst schema` prints.

| key | type | default | meaning |
|---|---|---|---|"""


def run(arguments: argparse.Namespace) -> int:
    """Run the command of ``arguments.command``; return 0.

    Raises:
        ConfigError: there is no recipe of that name, or a file cannot be written.
    """
    if arguments.command == "recipes":
        _recipes(arguments.name.removesuffix(".json"), arguments.copy)
        return 0
    schema = json_schema()
    if arguments.command == "keys":
        print(_HEAD, *_rows("", schema, schema["$defs"]), sep="\n")
    else:
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


def _recipes(name: str, copy: Path | None) -> None:
    """List the recipes with ``name`` in their names, or print or copy the one of that name."""
    inside = _PACKAGE / "ds_configs"  # in a wheel; a checkout has them beside the package
    folder = inside if inside.is_dir() else _PACKAGE.parent / "ds_configs"
    rows = _RECIPE.findall((folder / "README.md").read_text(encoding="utf-8"))
    found = [row for row in rows if name == row[0]] or [row for row in rows if name in row[0]]
    is_one = len(found) == 1 and found[0][0] == name
    if not found or (copy and not is_one):
        names = ", ".join(row[0] for row in found or rows)
        raise ConfigError(f"{name!r} is not the name of a recipe. Choose one of {names}.")
    if not is_one:
        for row in [("recipe", "what it is for", "ranks"), *found]:
            print("{0:34}{2:>5}  {1}".format(*row))
        return
    content = (folder / f"{name}.json").read_text(encoding="utf-8")
    if copy is None:
        print(content, end="")
        return
    target = copy / f"{name}.json" if copy.is_dir() else copy
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"--copy {copy}: {error}. Name a file that does not exist yet.") from error
    print(f"{target}: for {found[0][2]} ranks; {found[0][1]}")
