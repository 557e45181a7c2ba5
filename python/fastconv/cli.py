"""The ``fastconv`` command.

Whatever takes long to import (rich, and above all TensorFlow) is imported by the command that
needs it, so that help comes at once and everything but ``mnist`` works without TensorFlow.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from fastconv.bench.command import bench, require_matplotlib, require_sound_environment
from fastconv.bench.gpu_roofline import roofline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import keras

    from fastconv.mnist.article import Result
    from fastconv.mnist.data import Mnist

Trained: TypeAlias = "dict[str, tuple[keras.Model, Result]]"  # by the name of the layers


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastconv", message="%(prog)s %(version)s")
def main() -> None:
    """Fast convolution and pooling for Keras and NumPy."""


main.add_command(bench)
main.add_command(roofline)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def info(as_json: bool) -> None:
    """Say what runs here: version, instruction sets, threads, CUDA."""
    require_sound_environment()
    import fastconv

    facts = fastconv.info()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


@main.command(short_help="Train the article's network on MNIST.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Passes over the data.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images a training step.",
)
@click.option(
    "--layers",
    type=click.Choice(["stock", "fast", "both"]),
    default="fast",
    show_default=True,
    help="Keras's layers, fastconv's, or both, compared.",
)
@click.option(
    "--data",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="MNIST as an .npz file in Keras's layout. Default: what keras.datasets.mnist has or "
    "downloads, else a subset that ships with fastconv.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the initial weights and the order of images.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take only the first N training and N test images, for a quick try.",
)
@click.option(
    "--plot",
    "plot_directory",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIRECTORY",
    help="Draw training curves, confusion matrix, filters and feature maps there, as SVG and PNG "
    "(needs matplotlib).",
)
def mnist(
    epochs: int,
    batch_size: int,
    layers: str,
    path: Path | None,
    seed: int,
    limit: int | None,
    plot_directory: Path | None,
) -> None:
    """Train a small convolutional network on MNIST, as the article does."""
    _require_tensorflow()
    require_sound_environment()
    if plot_directory is not None:
        require_matplotlib()
    data = _load_data(path)
    if limit is not None:
        data = data.limit(limit)
    _print_line(data.describe())
    article = _import_article()
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    if layers == "both":
        trained = _compare(article, data, options)
    else:
        trained = _train_one(article, layers, data, options)
    if plot_directory is not None:
        from fastconv.mnist import plots

        for drawn in plots.draw(trained, data, plot_directory):
            click.echo(f"drawn: {drawn}")


def _train_one(article: ModuleType, layers: str, data: Mnist, options: dict[str, int]) -> Trained:
    import keras

    namespace = article.STOCK if layers == "stock" else _fast_layers(article)
    keras.utils.set_random_seed(options["seed"])
    model = article.build_model(namespace)
    model.summary(line_length=78)
    result = article.train(model, data, **options)
    _report(result)
    return {layers: (model, result)}


def _compare(article: ModuleType, data: Mnist, options: dict[str, int]) -> Trained:
    from rich.console import Console

    from fastconv.mnist import report

    console = Console(highlight=False)
    _fast_layers(article)  # complain before training, not halfway
    stock, fast = article.same_start(options["seed"])
    batch_size = min(options["batch_size"], len(data.x_train))
    differences = article.differences(stock, fast, data, batch_size)
    results = []
    for name, model in (("Stock", stock), ("Fast", fast)):
        console.print(f"\n[bold]{name} layers[/]")
        results.append(article.train(model, data, **options))
        _report(results[-1])
    console.print()
    console.print(report.differences_table(differences, batch_size))
    console.print(report.results_table(*results))
    return {"stock": (stock, results[0]), "fast": (fast, results[1])}


def _print_line(text: str) -> None:
    """Prints a long line, wrapped between words on a terminal and left whole in a file."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def _report(result: Result) -> None:
    click.echo(f"Loss: {result.loss:.4f}, Accuracy: {result.accuracy:.4f}")


def _load_data(path: Path | None) -> Mnist:
    from fastconv.mnist import data

    try:
        return data.load(path)
    except data.DataError as error:
        raise click.BadParameter(str(error), param_hint="'--data'") from error


def _require_tensorflow() -> None:
    for module in ("tensorflow", "keras"):
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise click.ClickException(
                f"fastconv mnist needs TensorFlow and Keras, and {module} is not installed. "
                "Install both with:\n\n    pip install 'fastconv[tensorflow]'"
            )


def _import_article() -> ModuleType:
    from rich.console import Console

    # The layers run on Keras's TensorFlow backend, whatever keras.json says for other programs.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    try:
        with Console().status("Loading TensorFlow"), _quiet_tensorflow():
            from fastconv.mnist import article
    except ImportError as error:
        raise click.ClickException(f"TensorFlow cannot be imported: {error}") from error
    return article


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow's start-up notes off the screen, unless TF_CPP_MIN_LOG_LEVEL is set.

    The variable alone does not do: some notes are written before TensorFlow reads it, straight to
    the file descriptor. What was held back is shown after all if the import fails.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(stderr, notes.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _fast_layers(article: ModuleType) -> Any:
    try:
        return article.fast_layers()
    except (ImportError, OSError) as error:
        raise click.ClickException(f"fastconv's layers cannot be loaded: {error}") from error


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _readable(value))
    Console(highlight=False).print(table)


def _readable(value: object) -> str:
    """One fact on a line: yes, no, or a list with commas, instead of Python's spelling."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')}: {_readable(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_readable, value)) or "none"
    return "none" if value is None else str(value)
