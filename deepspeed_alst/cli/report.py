"""``ds_alst report``: the environment, a verdict for each part of it."""

import argparse
import platform

SUMMARY = "the environment that a run would have, with a verdict for each part of it and what to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ds_alst report``."""
    parser.add_argument("--json", action="store_true", help="print the rows as JSON: name, value, verdict, remedy")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns 1 if anything in it is a problem."""
    print(f"python {platform.python_version()}")
    return 0
