"""Selection of a benchmark's tables: those named on the command line, or all."""

import argparse
from collections.abc import Collection


def chosen_parts(description: str, parts: Collection[str]) -> list[str]:
    """Return the parts to print, in the order given."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(parts))
    names = parser.parse_args().parts or list(parts)
    if unknown := set(names) - set(parts):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(parts)}")
    return names
