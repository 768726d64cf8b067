"""``ds_alst``: finds the command that is asked for, and loads that one alone."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from deepspeed_alst.errors import AlstError

# Modules of this folder. Each has SUMMARY, EXAMPLES, add_arguments(parser) and run(arguments), which returns the exit
# status; it imports what is heavy (torch, deepspeed, transformers) in run, so that --help is quick and commands fail
# one by one.
COMMANDS = ("report", "verify", "plan")
_ERROR_STATUS = 2  # as argparse's


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: of the command line, without the program's name; None: of this process.

    Returns:
        The exit status: the command's own, or 2 for an error that is this package's to explain.
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
