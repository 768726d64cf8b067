"""``ds_alst``: dispatches to the module of the requested command.

Each has SUMMARY, EXAMPLES, run(arguments) -> exit status and, if it has options, add_arguments(parser). Heavy imports
(torch, deepspeed, transformers) belong in run: --help stays fast, and commands fail independently.
"""

import argparse
import sys
from collections.abc import Sequence

from deepspeed_alst.cli import keys, plan, report, schema, verify
from deepspeed_alst.errors import AlstError

_ERROR_STATUS = 2  # same as argparse


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: command-line arguments without the program's name; None for those of this process.

    Returns:
        Exit status: the command's own, or 2 for an AlstError.
    """
    parser = argparse.ArgumentParser(prog="ds_alst", description="What one wants to know before a long run.")
    version = f"deepspeed_alst {sys.modules['deepspeed_alst'].__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for module in (report, verify, plan, keys, schema):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if hasattr(module, "add_arguments"):
            module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    try:
        return arguments.run(arguments)
    except AlstError as error:
        print(f"ds_alst {arguments.command}: {error}", file=sys.stderr)
        return _ERROR_STATUS
