"""Rows of a report, printed as a table for people or as JSON for programs."""

import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "problem"]

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Row:
    """One part of the environment. The field names are the keys of the JSON and must not change."""

    name: str
    value: str
    verdict: Verdict = "ok"
    """``note``: a run works, with reduced speed or features. ``problem``: it fails, or deviates from the ds_config."""
    remedy: str = ""


def guarded(name: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of one part; an exception becomes a row, so that other parts are still reported."""
    try:
        yield from rows()
    except Exception as error:  # whatever a broken installation raises
        yield Row(name, in_short(error), "problem", "see the error's cause in this part, or install it again")


def in_short(error: BaseException) -> str:
    """Format an exception as one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return textwrap.shorten(text, _ERROR_CHARACTERS, placeholder=" ...")


def print_json(rows: Iterable[Row]) -> None:
    """Print rows as a JSON list of objects: name, value, verdict, remedy."""
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


def print_table(rows: list[Row], title: str) -> None:
    """Print rows as a table, each remedy under its value, and a last line with the verdict counts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        remedy = f"\n[{_STYLES[row.verdict]}]->[/] {escape(row.remedy)}" if row.remedy else ""
        verdict = f"[{_STYLES[row.verdict]}]{row.verdict}[/]"
        table.add_row(escape(row.name), verdict, escape(row.value) + remedy)
    console = Console()
    # A log file has no terminal width.
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in _STYLES}
    console.print(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok", highlight=False)
