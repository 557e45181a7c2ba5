"""The options of ``fastconv bench``, and what they set going."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from rich.progress import Progress

    from fastconv.bench._types import Record
    from fastconv.bench.problem import Problem

CaseOfSuite: TypeAlias = "tuple[Problem, str, str]"  # problem, direction, suite

# What a shell takes for "ended by an interrupt".
_INTERRUPTED = 130

DEFAULT_SUITES = ("mnist",)
SUITE_NAMES = (
    "mnist, alexnet, vgg16, resnet50, mobilenetv2, mobilenet, efficientnet, convnext, grouped, dilated, "
    "sequences, deepbench, pooling, random:SEED:COUNT"
)


class FiniteRange(click.FloatRange):
    """A range of numbers, of which "nan" and "inf" are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return float(number)


@click.command(short_help="Measure kernels beside other libraries'.")
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
@click.option(
    "--batch", type=click.IntRange(1, 2**31 - 1), help="Instead of each problem's batch size."
)
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
@click.option("--algorithm", metavar="NAME", help="Prefer this of fastconv's, wherever it serves.")
@click.option(
    "--accuracy", type=click.Choice(["strict", "default", "fast"]), help="fastconv's setting."
)
@click.option(
    "--filter", type=click.Choice(["packed", "plain"]), default="packed", show_default=True,
    help="Of fastconv's fprop and dgrad: packed beforehand, as oneDNN's, ONNX Runtime's and "
    "OpenVINO's are, or laid out anew in each call, as in training.",
)  # fmt: skip
@click.option(
    "--cache", type=click.Choice(["warm", "cold"]), default="warm", show_default=True,
    help="Whether the data may be in the caches.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--seconds", type=FiniteRange(min=0, min_open=True), default=0.1, show_default=True,
    help="Timed for an implementation and a case, in all rounds together.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write JSON there.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write CSV there.")
@click.option(
    "--compare",
    "compared",
    nargs=2,
    type=click.Path(exists=True, dir_okay=False),
    metavar="OLD.json NEW.json",
    help="Measure nothing; name what became slower, and exit with 1 where something did.",
)
@click.option(
    "--threshold", type=FiniteRange(min=0), default=0.1, show_default=True,
    help="Of --compare: by how much a case may become slower.",
)  # fmt: skip
@click.option(
    "--plot",
    "plot_directory",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIRECTORY",
    help="Draw rooflines, bars and errors there, as SVG and PNG (needs matplotlib).",
)
@click.option(
    "--from",
    "from_path",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE.json",
    help="Measure nothing; show the results of an earlier --json.",
)
@click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.md",
    help="Write a page with figures there; measures every suite, unless told what to measure.",
)
@click.option("--brief", is_flag=True, help="Print the means alone.")
def bench(
    problems: tuple[str, ...],
    suites: tuple[str, ...],
    paths: tuple[Path, ...],
    directions: str | None,
    implementations: str | None,
    compared: tuple[str, str] | None,
    from_path: str | None,
    report_path: Path | None,
    **options: Any,
) -> None:
    """Measure kernels beside other libraries', every result checked first.

    A PROBLEM is written as for oneDNN's benchdnn: mb32ic64ih56oc64oh56kh3ph1. Without one, and
    without --suite and --file, the suite mnist is measured.
    """
    if compared:
        _compare(*compared, options["threshold"])
        return
    if options["plot_directory"] or report_path:
        require_matplotlib()
    if from_path:
        _show(_read(from_path), options, report_path)
        return
    require_sound_environment()
    _require_room(options["json_path"])
    _require_room(options["csv_path"])
    _require_room(report_path, makes_directories=True)
    if report_path and not (problems or suites or paths):
        suites = ("all",)
    _require_algorithm(options["algorithm"])
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
    _show(run, options, report_path)
    if not run["complete"]:
        sys.exit(_INTERRUPTED)
    if failed := run["failed"]:
        raise click.ClickException(
            f"fastconv could not be measured in {len(failed)} of {len(cases)} cases. {failed[0]}"
        )


def _read(path: str, times_alone: bool = False) -> Record:
    from fastconv.bench import files

    try:
        return files.read_json(path, times_alone)
    except files.FileError as error:
        raise click.ClickException(str(error)) from error


def _compare(old: str, new: str, threshold: float) -> None:
    from fastconv.bench import compare, tables

    found = compare.compare(_read(old, True), _read(new, True), threshold)
    _console().print(tables.comparison(found, threshold))
    if found.regressions:
        sys.exit(1)


def require_matplotlib() -> None:
    """Complains where there is none, before anything takes long."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException(
            "Plots need matplotlib, which is not installed. "
            "Install it with:\n\n    pip install 'fastconv[plot]'"
        )


def _require_room(path: str | Path | None, makes_directories: bool = False) -> None:
    """Complains where a file cannot be written, before what it will hold is measured."""
    if path is None:
        return
    directory = Path(path).parent
    while makes_directories and not directory.exists():
        directory = directory.parent
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise click.ClickException(f"{path} cannot be written: {directory} is no directory for it")


def require_sound_environment() -> None:
    """Complains of a wrong environment variable of fastconv's, before anything takes long."""
    import fastconv

    try:
        fastconv.info()
        fastconv.get_accuracy()
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _require_algorithm(name: str | None) -> None:
    from fastconv import _core

    if name is None:
        return
    before = _core.algorithm()
    try:
        _core.set_algorithm(name)  # which knows the names
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--algorithm'") from error
    _core.set_algorithm(before)


def _cases(
    texts: Sequence[str],
    suite_names: Sequence[str],
    paths: Sequence[Path],
    directions: str | None,
    batch: int | None,
) -> list[CaseOfSuite]:
    """[(problem, direction, its suite)], each case once."""
    from fastconv.bench import problem as problems
    from fastconv.bench import suites

    wanted = None
    if directions is not None:
        wanted = [problems.parse_direction(name) for name in directions.split(",")]
    if not texts and not suite_names and not paths:
        suite_names = DEFAULT_SUITES
    listed: list[tuple[Problem, tuple[str, ...] | None, str]] = [
        (problems.parse(text), None, "problems") for text in texts
    ]
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise problems.ProblemError(f"{path} cannot be read: {error}") from error
        listed += [(*line, path.stem) for line in problems.parse_lines(lines)]
    for name in suite_names:
        for one in suites.SUITES if name == "all" else [name]:
            listed += [(problem, None, one) for problem in suites.suite(one)]
    cases: dict[tuple[Problem, str], str] = {}
    for problem, own, suite in listed:
        if batch is not None:
            problem = problem.with_batch(batch)
        for direction in wanted or own or problem.directions:
            if direction in problem.directions:
                cases.setdefault((problem, direction), suite)
    if not cases:
        asked = f"of direction {directions}" if directions else "in what was asked for"
        raise problems.ProblemError(f"There is no problem {asked}, so nothing to measure")
    return [(*case, suite) for case, suite in cases.items()]


def _names(text: str | None) -> list[str]:
    from fastconv.bench import adapters

    if text is None:
        return list(adapters.NAMES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise click.UsageError(f"--impl must list names of modules. Received: {text!r}")
    return list(dict.fromkeys(names))


def _measure(cases: list[CaseOfSuite], names: list[str], options: dict[str, Any]) -> Record:
    import fastconv
    from fastconv.bench.session import Conditions, Session

    conditions = Conditions(
        threads=options["threads"] or fastconv.get_num_threads(),
        layout=options["layout"],
        isa=options["isa"],
        algorithm=options["algorithm"],
        accuracy=options["accuracy"],
        filter=options["filter"],
        cold=options["cache"] == "cold",
        rounds=options["rounds"],
        seconds=options["seconds"],
        seed=options["seed"],
    )
    run: Record = {"command": _command(), "complete": False, "planned": len(cases), "results": []}
    start = time.monotonic()
    with _progress(len(cases)) as progress:
        progress.say("starting " + ", ".join(names))
        with Session(names, conditions, on_note=progress.note) as session:
            try:
                for problem, direction, suite in cases:
                    progress.say(f"{direction} {problem.name or problem}")
                    record = session.measure(problem, direction)
                    run["results"].append({"suite": suite, **record})
                    progress.step()
                run["complete"] = True
            except KeyboardInterrupt:
                progress.note("interrupted: what was measured is kept")
            run["conditions"] = session.describe()
            run["failed"] = session.failed
    run["seconds"] = time.monotonic() - start
    return run


def _command() -> str:
    """The command line, without what changes no figure."""
    words = ["fastconv"]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--json", "--csv", "--plot"):
            next(arguments, None)
        elif word != "--brief" and not word.startswith(("--json=", "--csv=", "--plot=")):
            words.append(word)
    return shlex.join(words)


class _Lines:
    """Progress where no terminal shows a bar."""

    def say(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def step(self) -> None:
        pass


class _Bar:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, style="dim", highlight=False, markup=False)

    def step(self) -> None:
        self._progress.advance(self._task)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[_Lines | _Bar]:
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


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=240)  # in a file, lines are left whole


def _show(run: Record, options: dict[str, Any], report_path: Path | None) -> None:
    from fastconv.bench import files, tables

    failures = []
    for write, path in (
        (files.write_json, options["json_path"]),
        (files.write_csv, options["csv_path"]),
    ):
        try:
            if path:
                write(path, run)
        except OSError as error:  # noqa: PERF203 - two files
            failures.append(f"{path} cannot be written: {error}")
    console = _console()
    console.print(tables.results(run, console.width, details=not options["brief"]))
    if failures:  # now that the figures are not lost
        raise click.ClickException("\n".join(failures))
    if options["plot_directory"] and run["results"]:
        from fastconv.bench import plots

        for path in plots.draw(run, options["plot_directory"]):
            click.echo(f"drawn: {path}")
    if report_path and run["results"]:
        from fastconv.bench import plots, report

        report.write(run, report_path, plots.draw)
        click.echo(f"written: {report_path}")
