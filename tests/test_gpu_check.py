"""``make gpu-check`` on a machine without a GPU, and the report that it writes on one with."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_support
from fastconv.bench.problem import DIRECTIONS

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def nvidia_smi(folder, script):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "nvidia-smi is not installed"),
        ("echo No devices were found; exit 6", "nvidia-smi says: No devices were found"),
        ("exit 0", "nvidia-smi says: exit status 0"),
    ],
)
def test_without_a_gpu(tmp_path, script, reason):
    """It says so, with a status of its own, and builds nothing."""
    if script:
        nvidia_smi(tmp_path, script)
    run = subprocess.run(
        [sys.executable, TOOLS / "gpu_check.py"],
        env={**os.environ, "PATH": f"{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 3
    assert run.stderr.startswith("gpu-check: there is no NVIDIA GPU here: ")
    assert reason in run.stderr
    assert run.stderr.endswith("Nothing was built or run.\n")
    assert run.stdout == ""


def test_gpu_is_described(tmp_path, monkeypatch, gpu_check):
    nvidia_smi(tmp_path, "echo 'NVIDIA X, 9.0, 580.1, 80 MiB, 1980 MHz, 2619 MHz, 700.00 W'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpus, reason = gpu_check.gpu()
    assert reason == ""
    assert gpus[0]["name"] == "NVIDIA X"
    assert gpus[0]["compute_cap"] == "9.0"


@cuda_support.EMULATOR_ONLY
def test_rehearsal(tmp_path):
    """Every step behind the build, on the emulator; compute-sanitizer has a stand-in."""
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\n[ "$2" = initcheck ] && exit 9\nshift 6\nexec "$@"\n')
    program.chmod(0o755)
    run = subprocess.run(
        [
            sys.executable, TOOLS / "gpu_check.py", "--folder", tmp_path / "check",
            "--rehearse", cuda_support.library("fast"),
        ],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    text = (tmp_path / "check" / "report.md").read_text()
    assert run.returncode == 1, text + run.stderr  # initcheck's stand-in failed
    assert "something FAILED. Please send" in run.stdout
    assert "- GPUs: none: a rehearsal" in text
    for step in ("info", "tests", "memcheck", "racecheck", "synccheck", "benchmark"):
        assert f"| {step} | passed |" in text, text
    assert "| initcheck | FAILED (9) |" in text
    assert '"available": true' in text
    assert "3 passed" in text
    assert "## Times beside the CPU, in a rehearsal" in text
    problem = "mb2ic8ih7iw6oc16oh7ow6kh3ph1"
    for direction, dtype in itertools.product(DIRECTIONS, ("float32", "float16")):
        assert f"| rehearsed `{problem}` | {direction} | {dtype} |" in text


def test_no_library_to_compare_with_is_no_failure(tmp_path, gpu_check):
    report = gpu_check.Report({})
    script = "import sys; print('none here'); sys.exit(4)"
    report.step("benchmark", [sys.executable, "-c", script], 60, left_out=gpu_check.NO_PEER)
    assert gpu_check.finish(report) == 0
    assert "| benchmark | left out: none here |" in (tmp_path / "report.md").read_text()


def test_report(tmp_path, gpu_check):
    """A failed step is told at the end; the table of times has a row for each layer."""
    report = gpu_check.Report({"GPUs": "NVIDIA X"})
    assert report.step("tests", [sys.executable, "-c", "print('1 passed')"], 60)[0]
    assert not report.step("memcheck", [sys.executable, "-c", "import sys; sys.exit(9)"], 60)[0]
    assert not report.step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2)[0]
    report.add("racecheck", "left out: no compute-sanitizer here")
    row = {
        "problem": "mb1ic8ih8oc8kh3", "name": "conv", "direction": "fprop", "dtype": "float16",
        "algorithm": "tensor_core_gemm", "blocking": "64x64x32 tiles", "predicted_seconds": 1e-6,
        "flops": 4e6, "largest_difference": 1e-3, "seconds_fastconv": 9e-6, "seconds_cuDNN": 8e-6,
        "kernel_seconds_fastconv": 2e-6, "kernel_seconds_cuDNN": 3e-6,
    }  # fmt: skip
    report.benchmark = {"peer": "cuDNN 9", "rows": [row], "failures": []}
    assert gpu_check.finish(report) == 1
    text = (tmp_path / "report.md").read_text()
    assert "- GPUs: NVIDIA X" in text
    assert "| tests | passed |" in text
    assert "| memcheck | FAILED (9) |" in text
    assert "| slow | FAILED (stopped after 0.2 s) |" in text
    assert "| racecheck | left out: no compute-sanitizer here |" in text
    assert "1 passed" in text
    assert "| conv `mb1ic8ih8oc8kh3` | fprop | float16 | tensor_core_gemm: 64x64x32 tiles " in text
    assert "| 2.0 | 3.0 | 1.50 | 2.0 | 9.0 | 8.0 | 1.0e-03 |" in text
    assert "| float16 | fprop | 1 | 1.50 | 1.50 | 1.50 |" in text
