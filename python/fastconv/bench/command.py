"""The options of ``fastconv bench``, and what they set going."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import click

DEFAULT_SUITES = ("mnist",)
SUITE_NAMES = (
    "mnist, alexnet, vgg16, resnet50, mobilenetv2, grouped, deepbench, pooling, random:SEED:COUNT"
)


@click.command()
@click.argument("problems", nargs=-1, metavar="[PROBLEM]...")
@click.option("--suite", "suites", multiple=True, metavar="NAME", help=f"{SUITE_NAMES}, or all.")
@click.option(
    "--file",
    "paths",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of problems, one a line, as benchdnn has them (--dir=FWD_D,BWD_W within).",
)
@click.option(
    "--dir",
    "directions",
    metavar="LIST",
    help="fprop, dgrad, wgrad (or benchdnn's FWD_D, BWD_D, BWD_W), with commas. Default: all.",
)
@click.option(
    "--impl",
    "implementations",
    metavar="LIST",
    help="fastconv, tensorflow, torch, onnxruntime, openvino, onednn, jax, or importable modules, "
    "with commas. Default: all that are installed.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Instead of each problem's batch size.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: fastconv's.")
@click.option(
    "--layout", type=click.Choice(["nhwc", "nchw"]), default="nhwc", show_default=True,
    help="Of the activations, where a library has both.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32"]), default="float32", show_default=True,
    help="Of all arrays.",
)  # fmt: skip
@click.option(
    "--isa", type=click.Choice(["scalar", "avx2", "avx512"]),
    help="Limit the instruction set, of the peers too; one that cannot be limited is left out.",
)  # fmt: skip
@click.option("--algorithm", metavar="NAME", help="Force fastconv's algorithm.")
@click.option(
    "--accuracy", type=click.Choice(["strict", "default", "fast"]), help="fastconv's setting."
)
@click.option(
    "--cache", type=click.Choice(["warm", "cold"]), default="warm", show_default=True,
    help="Whether the data may be in the caches.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True,
    help="Timed for an implementation and a case, in all rounds together.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write JSON there.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write CSV there.")
@click.option("--brief", is_flag=True, help="Print the means alone.")
def bench(problems, suites, paths, directions, implementations, **options):
    """Measure kernels beside other libraries', every result checked first.

    A PROBLEM is written as for oneDNN's benchdnn: mb32ic64ih56oc64oh56kh3ph1. Without one, and
    without --suite and --file, the suite mnist is measured.
    """
    from fastconv.bench.problem import ProblemError
    from fastconv.bench.session import BenchError

    try:
        cases = _cases(problems, suites, paths, directions, options["batch"])
    except ProblemError as error:
        raise click.UsageError(str(error)) from error
    try:
        run = _measure(cases, _names(implementations), options)
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    _show(run, options)
    if not run["complete"]:
        sys.exit(130)


def _cases(texts, suite_names, paths, directions, batch):
    """[(problem, direction)], each once."""
    from fastconv.bench import problem as problems
    from fastconv.bench import suites

    wanted = None
    if directions is not None:
        wanted = [problems.parse_direction(name) for name in directions.split(",")]
    if not texts and not suite_names and not paths:
        suite_names = DEFAULT_SUITES
    listed = [(problems.parse(text), None) for text in texts]
    for path in paths:
        listed += problems.parse_lines(path.read_text().splitlines())
    for name in suite_names:
        for one in suites.SUITES if name == "all" else [name]:
            listed += [(problem, None) for problem in suites.suite(one)]
    cases = {}
    for problem, own in listed:
        if batch is not None:
            problem = problem.with_batch(batch)
        for direction in wanted or own or problem.directions:
            if direction in problem.directions:
                cases.setdefault((problem, direction))
    if not cases:
        raise problems.ProblemError(f"There is nothing to measure in {directions}")
    return list(cases)


def _names(text):
    from fastconv.bench import adapters

    return list(adapters.NAMES) if text is None else list(dict.fromkeys(text.split(",")))


def _measure(cases, names, options):
    import fastconv
    from fastconv.bench.session import Conditions, Session

    conditions = Conditions(
        threads=options["threads"] or fastconv.get_num_threads(),
        layout=options["layout"],
        isa=options["isa"],
        algorithm=options["algorithm"],
        accuracy=options["accuracy"],
        cold=options["cache"] == "cold",
        rounds=options["rounds"],
        seconds=options["seconds"],
        seed=options["seed"],
    )
    run = {"complete": False, "planned": len(cases), "results": []}
    start = time.monotonic()
    with _progress(len(cases)) as progress:
        progress.say("starting " + ", ".join(names))
        with Session(names, conditions, on_note=progress.note) as session:
            try:
                for problem, direction in cases:
                    progress.say(f"{direction} {problem.name or problem}")
                    run["results"].append(session.measure(problem, direction))
                    progress.step()
                run["complete"] = True
            except KeyboardInterrupt:
                progress.note("interrupted: what was measured is kept")
            run["conditions"] = session.describe()
    run["seconds"] = time.monotonic() - start
    return run


class _Lines:
    """Progress where no terminal shows a bar."""

    def say(self, text):
        pass

    def note(self, text):
        click.echo(text, err=True)

    def step(self):
        pass


class _Bar:
    def __init__(self, progress, total):
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def say(self, text):
        self._progress.update(self._task, description=text)

    def note(self, text):
        self._progress.console.print(text, style="dim", highlight=False, markup=False)

    def step(self):
        self._progress.advance(self._task)


@contextlib.contextmanager
def _progress(total):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    # Redrawn seldom: the redrawing thread shares the CPUs with what is timed.
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
        transient=True,
    ) as progress:
        yield _Bar(progress, total)


def _show(run, options):
    from rich.console import Console

    from fastconv.bench import files, tables

    if options["json_path"]:
        files.write_json(options["json_path"], run)
    if options["csv_path"]:
        files.write_csv(options["csv_path"], run)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=int(os.environ.get("COLUMNS", "200")))
    console.print(tables.results(run, details=not options["brief"]))
