#!/usr/bin/env python3
"""Runs fastconv's CUDA kernels on this machine's GPU and writes a report to send back.

1. builds the package with the CUDA kernels in a virtual environment of its own, which sees the
   PyTorch or CuPy that is installed outside (--installed: takes the fastconv of the Python that runs
   this program, for machines without a network);
2. runs the tests of the kernels on the device;
3. runs some of them under compute-sanitizer, where it is installed: memcheck, racecheck, initcheck,
   synccheck;
4. times the kernels beside cuDNN, by PyTorch or CuPy, where one is installed.

Each step is reported, whatever became of the one before (but for the build). The exit status is 0 if
all that could run passed, 1 if something failed, 3 if there is no NVIDIA GPU; nothing is built then.

--rehearse runs the steps on a machine without a GPU: with the Python that runs this program and the
fastconv installed there, a module of the emulator for the kernels, and few tests.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu-check"
NO_GPU = 3
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Small problems of each kernel: compute-sanitizer slows a kernel down a hundred times.
SANITIZED_TESTS = ["tests/test_cuda_kernels.py", "-k", "not large and not same_bits"]
# The others are about the emulator and the compiler, which need no GPU.
TESTS = [f"tests/test_cuda{name}.py" for name in ("", "_kernels", "_xla", "_frameworks")]
REHEARSED_TESTS = ["tests/test_cuda_kernels.py", "-k", "nan_and_infinity"]
NO_PEER = 4  # of gpu_benchmark.py


def gpu():
    """What nvidia-smi says of the GPUs; None and why, if there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, "nvidia-smi is not installed, which comes with NVIDIA's driver"
    query = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    run = subprocess.run(
        [program, f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode != 0 or not run.stdout.strip():
        said = " ".join((run.stdout + run.stderr).split()) or f"exit status {run.returncode}"
        return None, f"nvidia-smi says: {said}"
    return [dict(zip(query.split(","), line.split(", "), strict=False))
            for line in run.stdout.strip().splitlines()], ""  # fmt: skip


def compute_sanitizer():
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def times_of(row):
    """(fastconv's, cuDNN's) time in seconds: of the kernels alone, where the peer tells them."""
    alone = [row[f"kernel_seconds_{name}"] for name in ("fastconv", "cuDNN")]
    return [row[f"seconds_{name}"] for name in ("fastconv", "cuDNN")] if None in alone else alone


def tables_of(rows):
    """Lines of Markdown: means of the ratios, and a row for each layer."""
    ratios = {}
    for row in rows:
        mine, theirs = times_of(row)
        ratios.setdefault((row["dtype"], row["direction"]), []).append(theirs / mine)
    lines = [
        "| type | pass | layers | cuDNN / fastconv, geometric mean | least | largest |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (dtype, direction), values in ratios.items():
        lines.append(
            f"| {dtype} | {direction} | {len(values)} | {statistics.geometric_mean(values):.2f} "
            f"| {min(values):.2f} | {max(values):.2f} |"
        )
    head = ["layer", "pass", "type", "kernel", "fastconv us", "cuDNN us", "cuDNN / fastconv"]
    head += ["TFLOP/s", "calls: fastconv us", "cuDNN us", "difference"]
    lines += ["", f"| {' | '.join(head)} |", "|---|---|---|---" + "|---:" * 7 + "|"]
    for row in rows:
        mine, theirs = times_of(row)
        lines.append(
            f"| {row['name'] or ''} `{row['problem']}` | {row['direction']} | {row['dtype']} "
            f"| {row['algorithm']}: {row['blocking']} | {mine * 1e6:.1f} | {theirs * 1e6:.1f} "
            f"| {theirs / mine:.2f} | {row['flops'] / mine / 1e12:.1f} "
            f"| {row['seconds_fastconv'] * 1e6:.1f} | {row['seconds_cuDNN'] * 1e6:.1f} "
            f"| {row['largest_difference']:.1e} |"
        )
    return lines


class Report:
    """The steps so far, written to disk after each: an interrupted run has its report too."""

    def __init__(self, facts):
        self.facts, self.steps, self.benchmark = facts, [], None

    def step(self, name, command, timeout, environment=None, keep=60, left_out=None):
        """(Whether it passed, its log). ``left_out``: an exit status that says what is missing."""
        print(f"gpu-check: {name} ...", flush=True)
        start = time.monotonic()
        log = FOLDER / f"{name.replace(' ', '-')}.log"
        try:
            with open(log, "wb") as out:
                status = subprocess.run(
                    command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=timeout,
                    env={**os.environ, **(environment or {})}, check=False,
                ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = f"stopped after {timeout} s"
        lines = log.read_text(errors="replace").splitlines()
        result = "passed" if status == 0 else f"FAILED ({status})"
        if left_out is not None and status == left_out:
            result = f"left out: {lines[-1] if lines else status}"
        self.add(name, result, time.monotonic() - start, lines[-keep:])
        return status == 0, log

    def add(self, name, result, seconds=0.0, lines=()):
        print(f"gpu-check: {name}: {result}", flush=True)
        self.steps.append((name, result, seconds, list(lines)))
        self.write()

    @property
    def failed(self):
        return any(result.startswith("FAILED") for _, result, _, _ in self.steps)

    def write(self):
        text = ["# fastconv: gpu-check", ""]
        text += [f"- {name}: {value}" for name, value in self.facts.items()]
        text += ["", "| step | result | seconds |", "|---|---|---:|"]
        text += [
            f"| {name} | {result} | {seconds:.0f} |" for name, result, seconds, _ in self.steps
        ]
        if self.benchmark:
            text += ["", f"## Times beside {self.benchmark['peer']}", ""]
            text += tables_of(self.benchmark["rows"])
        for name, result, _, lines in self.steps:
            text += ["", f"## {name}: {result}", "", "```", *lines, "```"]
        path = FOLDER / "report.md"
        path.write_text("\n".join(text) + "\n")
        return path


def main():
    global FOLDER
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--native", action="store_true",
                        help="compile for this GPU's architecture alone: one minute, not ten")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="without compute-sanitizer; benchmark the article's layers alone")  # fmt: skip
    parser.add_argument("--installed", action="store_true",
                        help="build nothing: test the fastconv installed in this Python")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: build/gpu-check")
    parser.add_argument("--rehearse", type=Path, metavar="MODULE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    FOLDER = options.folder.resolve()

    gpus, reason = gpu() if options.rehearse is None else ([], "")
    if gpus is None:
        print(f"gpu-check: there is no NVIDIA GPU here: {reason}. Nothing was built or run.",
              file=sys.stderr)  # fmt: skip
        return NO_GPU
    FOLDER.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "system": platform.platform(),
        "python": platform.python_version(),
        "GPUs": "; ".join(" ".join(one.values()) for one in gpus) or "none: a rehearsal",
    }
    report = Report(facts)
    on_device = {"FASTCONV_TEST_BACKENDS": "cuda"}
    if options.rehearse is not None:
        on_device["FASTCONV_CUDA_LIBRARY"] = str(options.rehearse.resolve())
        report.add("build", "left out: a rehearsal")
        run(report, sys.executable, on_device, options, REHEARSED_TESTS, REHEARSED_TESTS,
            ["--rehearse"])  # fmt: skip
        return finish(report)

    if options.installed:
        report.add("build", "left out: the installed fastconv")
        return run_all(report, sys.executable, on_device, options)

    environment = {"FASTCONV_CUDA": "ON" if nvcc() else "pypi"}
    if nvcc():
        environment["CUDACXX"] = nvcc()
    if options.native:
        architecture = gpus[0]["compute_cap"].replace(".", "") + "-real"
        environment["SKBUILD_CMAKE_DEFINE"] = f"CMAKE_CUDA_ARCHITECTURES={architecture}"
    python = FOLDER / "venv" / "bin" / "python"
    built, _ = report.step(
        "environment",
        [sys.executable, "-m", "venv", "--system-site-packages", FOLDER / "venv"],
        600,
    )
    # Compiled once: to install what lies in "." is to build it again, each time.
    wheels = FOLDER / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    built = built and report.step(
        "build", [python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, "."],
        7200, environment,
    )[0]  # fmt: skip
    for name, extra in (("install", ["--force-reinstall", "--no-deps"]), ("dependencies", [])):
        which = f"{next(wheels.glob('*.whl'))}{'' if extra else '[test]'}" if built else ""
        built = built and report.step(
            name, [python, "-m", "pip", "install", *extra, which], 3600
        )[0]  # fmt: skip
    if not built:
        return finish(report)
    return run_all(report, python, on_device, options)


def run_all(report, python, on_device, options):
    run(report, python, on_device, options, TESTS, SANITIZED_TESTS,
        ["--suite", "mnist"] if options.quick else [])  # fmt: skip
    return finish(report)


def run(report, python, on_device, options, tests, sanitized_tests, benchmark):
    """The steps after the build."""
    report.step("info", [python, "-m", "fastconv", "info", "--json"], 120, on_device)
    report.step("tests", [python, "-m", "pytest", "-q", *tests], 7200, on_device)

    sanitizer = compute_sanitizer()
    for tool in SANITIZERS:
        if sanitizer is None or options.quick:
            report.add(tool, "left out" + ("" if options.quick else ": no compute-sanitizer here"))
            continue
        report.step(
            tool,
            [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
             python, "-m", "pytest", "-q", "-x", *sanitized_tests],
            7200, on_device,
        )  # fmt: skip

    log = FOLDER / "benchmark.json"
    script = f'"$0" tools/gpu_benchmark.py {" ".join(benchmark)} > "$1"'
    report.step("benchmark", ["sh", "-c", script, python, log], 7200, on_device, left_out=NO_PEER)
    try:
        report.benchmark = json.loads(log.read_text())
    except (OSError, ValueError):
        report.benchmark = None  # the step's own lines say why


def nvcc():
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def finish(report):
    path = report.write()
    print(f"gpu-check: {'something FAILED' if report.failed else 'all passed'}. "
          f"Please send {os.path.relpath(path)} back.")  # fmt: skip
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
