"""A row of a report, and how rows are printed: as a table for people, as JSON for programs."""

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
    """One part of the environment. The four names are the keys of the JSON, and stay as they are."""

    name: str
    value: str
    verdict: Verdict = "ok"
    """``note``: a run works, with less than it could have. ``problem``: it fails, or is not what the ds_config says."""
    remedy: str = ""


def guarded(name: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Rows of one part; an error in finding them out is a row too, so that the other parts are still reported."""
    try:
        yield from rows()
    except Exception as error:  # whatever a broken installation raises
        yield Row(name, in_short(error), "problem", "see the error's cause in this part, or install it again")


def in_short(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return textwrap.shorten(text, _ERROR_CHARACTERS, placeholder=" ...")


def print_json(rows: Iterable[Row]) -> None:
    """A JSON list of objects: name, value, verdict, remedy."""
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


def print_table(rows: list[Row], title: str) -> None:
    """A table of all rows, with each remedy under the value that needs it, and a last line that counts the verdicts."""
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
    # A log file has no width of its own.
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in _STYLES}
    console.print(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok", highlight=False)
