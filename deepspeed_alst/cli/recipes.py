"""``ds_alst recipes``: list, show and copy the ready ds_configs, which a checkout and a wheel bring along."""

import argparse
import re
from pathlib import Path

from deepspeed_alst.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
_ROW = re.compile(r"^\| `([^`]+)\.json` \| ([^|]+) \| ([^|]+) \|", re.M)


def run(arguments: argparse.Namespace) -> int:
    """List recipes, or print or copy one.

    Raises:
        ConfigError: no recipe of that name, or a file that cannot be written.
    """
    name = arguments.name.removesuffix(".json")
    rows = _ROW.findall((folder() / "README.md").read_text(encoding="utf-8"))
    found = [row for row in rows if name == row[0]] or [row for row in rows if name in row[0]]
    one = len(found) == 1 and found[0][0] == name
    if not found or (arguments.copy and not one):
        names = ", ".join(row[0] for row in found or rows)
        raise ConfigError(f"{name!r} is not the name of a recipe. Choose one of {names}.")
    if not one:
        for row in [("recipe", "what it is for", "ranks"), *found]:
            print("{0:34}{2:>5}  {1}".format(*row))
        return 0
    content = (folder() / f"{name}.json").read_text(encoding="utf-8")
    if arguments.copy is None:
        print(content, end="")
        return 0
    target = arguments.copy / f"{name}.json" if arguments.copy.is_dir() else arguments.copy
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"--copy {arguments.copy}: {error}. Name a file that is not there yet.") from error
    print(f"{target}: for {found[0][2]} ranks; {found[0][1]}")
    return 0


def folder() -> Path:
    """Return the folder of the ds_configs: within an installed package, or beside that of a checkout."""
    inside = _PACKAGE / "ds_configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "ds_configs"
