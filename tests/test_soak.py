"""Some seconds of what ``make soak`` does for half an hour, and its rule."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import soak


def test_seconds_of_it():
    run = subprocess.run(
        [sys.executable, "soak.py", "--minutes", "0.15", "--every", "0.5"],
        cwd=Path(soak.__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "memory is flat" in run.stdout
    [calls] = re.findall(r"([\d,]+) calls on arrays", run.stdout)
    [steps] = re.findall(r"([\d,]+) training steps, ", run.stdout)
    assert int(calls.replace(",", "")) > 1000
    assert int(steps.replace(",", "")) > 20


def test_a_leak_is_told_from_noise():
    rng = np.random.default_rng(0)
    noise = 800 * soak.MIB + rng.normal(0, 4 * soak.MIB, 180)
    assert soak.is_flat(noise)
    assert not soak.is_flat(noise + np.linspace(0, 40 * soak.MIB, 180))
    assert soak.is_flat(noise - np.linspace(0, 40 * soak.MIB, 180))  # what is given back


def test_a_wrong_result_is_noticed(monkeypatch):
    arrays = soak.Arrays()
    monkeypatch.setattr(arrays, "_cases", arrays._cases[:2])
    arrays.run_once()
    arrays._cases[1][1].x[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="differs from that of the first"):
        arrays.run_once()
