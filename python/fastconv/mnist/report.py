"""How the comparison of stock and fast layers is shown, within 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastconv.mnist.article import Difference, Result

# What fastconv promises for float32; a row beyond it is shown in red.
BOUND = 1e-5


def differences_table(differences: list[Difference], batch_size: int) -> Group:
    """One row for the forward pass and one for each gradient."""
    table = _table(
        "Difference from the same weights, fast to stock", "Shape", "Largest", "Relative"
    )
    for row in differences:
        colour = "green" if row.relative <= BOUND else "bold red"
        table.add_row(
            row.name,
            " x ".join(map(str, row.shape)),
            f"{row.largest:.1e}",
            Text(f"{row.relative:.1e}", colour),
        )
    images = "training image" if batch_size == 1 else f"{batch_size} training images"
    return _with_note(table, f"On the first {images}; relative to stock's largest absolute value.")


def results_table(stock: Result, fast: Result) -> Group:
    """Loss, accuracy and speed of the two trainings."""
    table = _table("Trained from the same weights", "Stock", "Fast", "Fast / stock")
    rows = (
        ("Test loss", "loss", ".4f"),
        ("Test accuracy", "accuracy", ".4f"),
        ("Seconds", "seconds", ".1f"),
        ("Images/s", "images_per_second", ",.0f"),
    )
    for label, field, form in rows:
        theirs, ours = getattr(stock, field), getattr(fast, field)
        table.add_row(label, _number(theirs, form), _number(ours, form), _ratio(ours, theirs))
    return _with_note(
        table,
        "Seconds: all of fit. Images/s: training images a second of fit after its\n"
        "first step, which traces the graph. XLA is off for both.",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _with_note(table: Table, note: str) -> Group:
    return Group(table, Text(note, style="dim"), "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "-" if ours is None or not theirs else f"{ours / theirs:.2f}x"
