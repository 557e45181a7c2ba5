"""Prints what the comparison of stock and fast layers came to, in 80 columns."""

from rich import box
from rich.table import Table

# What fastconv promises for float32; gradients are held to it as well.
BOUND = 1e-5


def differences_table(differences, batch_size):
    """One row for the forward pass and one for each gradient."""
    table = Table(
        title="Fast against stock layers, one batch, same initial weights",
        caption=(
            f"The first {batch_size} training images. Relative: to the largest value of stock."
        ),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    table.add_column("Shape", style="dim")
    table.add_column("Largest difference", justify="right")
    table.add_column("Relative", justify="right")
    for row in differences:
        colour = "green" if row.relative <= BOUND else "bold red"
        table.add_row(
            row.name,
            " x ".join(map(str, row.shape)),
            f"{row.largest:.1e}",
            f"[{colour}]{row.relative:.1e}[/]",
        )
    return table


def results_table(stock, fast):
    """Loss, accuracy and speed of the two trainings."""
    table = Table(
        title="Stock and fast layers, trained from the same start",
        caption=(
            "Seconds: all of fit. Images/s: training images a second of fit, from its second\n"
            "step on, the first being the one that traces the graph. XLA is off for both."
        ),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for name in ("Stock", "Fast", "Fast / stock"):
        table.add_column(name, justify="right")
    rows = (
        ("Test loss", "loss", ".4f"),
        ("Test accuracy", "accuracy", ".4f"),
        ("Seconds", "seconds", ".1f"),
        ("Images/s", "images_per_second", ",.0f"),
    )
    for label, field, form in rows:
        theirs, ours = getattr(stock, field), getattr(fast, field)
        table.add_row(label, _number(theirs, form), _number(ours, form), _ratio(ours, theirs))
    return table


def _number(value, form):
    return "-" if value is None else format(value, form)


def _ratio(ours, theirs):
    return "-" if ours is None or not theirs else f"{ours / theirs:.2f}x"
