"""Tables of measured figures beside their targets, and the exit status of a benchmark."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SUMMARY = "ALST_BENCHMARK_SUMMARY"
"""Environment variable with the path of a file that gets the tables' brief rows in Markdown; see benchmarks/all.py."""


@dataclass(frozen=True)
class Figure:
    """One row of a table."""

    name: str
    values: tuple[str, ...]
    """One text per column of the table."""
    target: str = ""
    """Empty for a figure that is only for information."""
    met: bool = True
    verdict: str = ""
    """Text instead of "ok" or "MISSED"."""
    brief: bool = True
    """False for a row that docs/benchmarks.md leaves out, unless it is missed."""

    def cells(self) -> list[str]:
        """Return the texts of the row."""
        verdict = self.verdict or ("ok" if self.met else "MISSED") * bool(self.target or not self.met)
        return [self.name, *self.values, self.target, verdict]


@dataclass(frozen=True)
class Part:
    """One table of a benchmark."""

    rows: Callable[[], Iterable[Figure]]
    columns: tuple[str, ...] = ("figure",)
    caption: str = ""


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show(title: str, part: Part) -> int:
    """Print a table; return the number of missed targets."""
    figures = []
    for figure in part.rows():
        figures.append(figure)
        print(f"{title}: {figure.name}: {figure.cells()[-1]}", file=sys.stderr, flush=True)
    head = ("", *part.columns, "target", "verdict")
    table = Table(*head, title=title, caption=part.caption, title_justify="left", caption_justify="left")
    for figure in figures:
        table.add_row(*figure.cells())
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    brief = [figure.cells() for figure in figures if figure.brief or not figure.met]
    if brief and SUMMARY in os.environ:
        with Path(os.environ[SUMMARY]).open("a", encoding="utf-8") as file:
            file.write(f"**{title}**\n\n{markdown(head, brief)}\n")
    return sum(not figure.met for figure in figures)


def report(description: str, parts: Mapping[str, Part], names: Iterable[str] | None = None) -> int:
    """Print the parts named on the command line, or ``names``; by default all.

    Returns:
        The exit status: 1 if a target is missed.
    """
    if names is None:
        parser = argparse.ArgumentParser(description=description.split("\n")[0])
        parser.add_argument("parts", nargs="*", choices=[*parts, []], metavar="part", help=", ".join(parts))
        names = parser.parse_args().parts
    start = time.monotonic()
    missed = sum(show(name, parts[name]) for name in names or parts)
    print(f"{missed} targets missed; {time.monotonic() - start:.0f} s", flush=True)
    return int(missed > 0)


def in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median seconds of each function, which take turns after a round of warm-up: load affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            begin = clock()
            function()
            times[name].append(clock() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
