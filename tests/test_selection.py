"""Which algorithm is chosen, what the settings do, and what explain() says of it."""

import os
import subprocess
import sys

import numpy as np
import pytest

import fastconv
from fastconv import _core
from running import running_on

X, W = (2, 9, 10, 32), (3, 3, 32, 48)


def test_explain_names_the_choice(isa):
    for direction in ("fprop", "dgrad", "wgrad"):
        explanation = fastconv.explain(X, W, direction=direction, padding="same")
        assert explanation["flops"] == 2 * (2 * 9 * 10 * 48) * (3 * 3 * 32)
        assert explanation["workspace_bytes"] > 0
        assert explanation["blocking"]
        names = [candidate["algorithm"] for candidate in explanation["candidates"]]
        assert explanation["algorithm"] in names
        assert "direct" in names
        chosen = explanation["candidates"][names.index(explanation["algorithm"])]
        assert chosen["allowed"]
        # The cheapest of those allowed, and a time that a computer could need.
        allowed = [c for c in explanation["candidates"] if c["allowed"]]
        assert chosen["predicted_seconds"] == min(c["predicted_seconds"] for c in allowed)
        assert 1e-7 < explanation["predicted_seconds"] < 1


def test_predicted_time_is_that_of_the_clock():
    """Within a factor that a loaded machine explains; a wrong unit would be off by a thousand.

    Of this thread's own processor time: another process may have the core.
    """
    import time

    x = np.ones((8, 28, 28, 64), np.float32)
    w = np.ones((3, 3, 64, 64), np.float32)
    with running_on(threads=1):
        predicted = fastconv.explain(x.shape, w.shape)["predicted_seconds"]
        seconds = []
        for _ in range(10):
            begin = time.thread_time()
            fastconv.conv2d(x, w)
            seconds.append(time.thread_time() - begin)
    assert predicted / 20 < min(seconds) < predicted * 20


def test_the_choice_does_not_depend_on_the_number_of_threads(isa):
    """Nor does what it rests on: how many times longer one algorithm takes than another."""

    def relative_times(threads):
        with running_on(threads=threads):
            found = []
            for images, size, channels, groups in [(2, 28, 64, 1), (5, 13, 32, 2), (16, 56, 48, 3)]:
                for direction in ("fprop", "dgrad", "wgrad"):
                    candidates = fastconv.explain(
                        (images, size, size, channels),
                        (3, 3, channels // groups, 96),
                        direction=direction,
                        groups=groups,
                        padding="same",
                    )["candidates"]
                    times = [candidate["predicted_seconds"] for candidate in candidates]
                    assert len(times) > 1
                    found.append([time / times[0] for time in times])
            return found

    expected = relative_times(1)
    for threads in (2, 3, 16):
        for times, right in zip(relative_times(threads), expected, strict=True):
            np.testing.assert_allclose(times, right, rtol=1e-12)


def test_strict_allows_sums_of_products_alone(isa):
    with running_on(accuracy="strict"):
        assert fastconv.get_accuracy() == "strict"
        for direction in ("fprop", "dgrad", "wgrad"):
            explanation = fastconv.explain(X, W, direction=direction)
            assert not explanation["algorithm"].startswith("winograd")


def test_preferred_algorithm_serves_or_gives_way(isa):
    with running_on(algorithm="direct"):
        assert fastconv.explain(X, W)["algorithm"] == "direct"
        assert _core.algorithm() == "direct"
    assert _core.algorithm() == "auto"


def test_named_algorithm(isa, rng):
    x = rng.standard_normal(X).astype(np.float32)
    w = rng.standard_normal(W).astype(np.float32)
    with running_on(accuracy="strict", algorithm="direct"):
        expected = fastconv.conv2d(x, w)
    np.testing.assert_array_equal(fastconv.conv2d(x, w, algorithm="direct"), expected)


WRONG = [
    (lambda: fastconv.set_accuracy("exact"), ValueError, "accuracy"),
    (lambda: fastconv.set_accuracy(1), TypeError, "accuracy"),
    (lambda: _core.set_algorithm("fft"), ValueError, "algorithm"),
    (lambda: fastconv.explain(X, W, direction="up"), ValueError, "direction"),
    (lambda: fastconv.explain(X, W, direction=None), TypeError, "direction"),
    (lambda: fastconv.explain(X, (3, 3, 7, 8)), ValueError, "channels"),
    (lambda: fastconv.explain(X), TypeError, "filter_shape"),
    (
        lambda: fastconv.conv2d(np.ones(X, "f"), np.ones(W, "f"), algorithm="fft"),
        ValueError,
        "algorithm",
    ),
    (
        lambda: fastconv.conv2d(np.ones(X, "f"), np.ones(W, "f"), algorithm=3),
        TypeError,
        "algorithm",
    ),
]


@pytest.mark.parametrize(("call", "error", "name"), WRONG)
def test_wrong_arguments(call, error, name):
    before = fastconv.get_accuracy(), _core.algorithm()
    with pytest.raises(error, match=f"(?s){name}.*Received: "):
        call()
    assert (fastconv.get_accuracy(), _core.algorithm()) == before


@pytest.mark.parametrize(
    ("variable", "value", "printed"),
    [
        ("FASTCONV_ACCURACY", "strict", "strict auto"),
        ("FASTCONV_ALGORITHM", "direct", "default direct"),
        ("FASTCONV_ACCURACY", "", "default auto"),
        ("FASTCONV_ACCURACY", "exact", "FASTCONV_ACCURACY must be one of"),
        ("FASTCONV_ALGORITHM", "fft", "FASTCONV_ALGORITHM must be one of"),
    ],
)
def test_environment(variable, value, printed):
    script = (
        "import fastconv; from fastconv import _core\n"
        "try: print(fastconv.get_accuracy(), _core.algorithm())\n"
        "except ValueError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert printed in result.stdout


def test_what_is_no_layer_imports_no_framework():
    script = (
        "import sys, numpy as np, fastconv\n"
        "try:\n"
        "    fastconv.explain(np.zeros((3, 99)))\n"
        "except TypeError as error:\n"
        "    print(error, sorted({'keras', 'tensorflow'} & set(sys.modules)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.endswith("Received: <ndarray of shape (3, 99)> []\n"), found.stdout
