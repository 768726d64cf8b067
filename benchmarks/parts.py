"""Which tables of a benchmark to print: those that the command line names, or all."""

import argparse
from collections.abc import Collection


def chosen_parts(description: str, parts: Collection[str]) -> list[str]:
    """The parts to print, in the order in which they were named."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(parts))
    names = parser.parse_args().parts or list(parts)
    if unknown := set(names) - set(parts):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(parts)}")
    return names
