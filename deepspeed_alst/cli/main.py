"""``ds_alst``: dispatches to the requested command and imports only its module."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from deepspeed_alst.errors import AlstError

# Modules of this folder, each with SUMMARY, EXAMPLES, add_arguments(parser) and run(arguments) -> exit status. Heavy
# imports (torch, deepspeed, transformers) belong in run: --help stays fast, and commands fail independently.
COMMANDS = ("report", "verify", "plan")
_ERROR_STATUS = 2  # same as argparse


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: command-line arguments without the program's name; None for those of this process.

    Returns:
        Exit status: the command's own, or 2 for an AlstError.
    """
    words = sys.argv[1:] if words is None else words
    arguments = _parser([name for name in COMMANDS if name in words[:1]] or COMMANDS).parse_args(words)
    try:
        return arguments.run(arguments)
    except AlstError as error:
        print(f"ds_alst {arguments.command}: {error}", file=sys.stderr)
        return _ERROR_STATUS


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds_alst", description="What one wants to know before a long run.")
    parser.add_argument(
        "--version", action="version", version=f"deepspeed_alst {sys.modules['deepspeed_alst'].__version__}"
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name in names:
        module = importlib.import_module(f"deepspeed_alst.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
