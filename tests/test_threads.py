"""Threads and instruction sets as a user sees them: settings, the GIL, concurrent calls, fork."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastconv
from conv2d_problems import Problem, assert_same_bits, normals, solve
from fastconv import _core
from running import running_on


def run_python(script, **environment):
    """Runs a script in a fresh interpreter: settings are read once a process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTCONV_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 1024, np.int64(2)])
def test_set_threads_are_told(threads):
    with running_on(threads=threads):
        assert fastconv.get_num_threads() == threads
        assert fastconv.info()["num_threads"] == threads
        assert type(fastconv.get_num_threads()) is int


def test_set_isa_is_told(isa):
    assert _core.isa() == isa
    assert fastconv.info()["isa"] == isa


def test_scalar_kernels_are_always_there():
    assert fastconv.info()["isa_available"][-1] == "scalar"


@pytest.mark.parametrize("threads", ["1", "2", "3", "1024"])
def test_environment_sets_threads(threads):
    result = run_python(
        "import fastconv; print(fastconv.get_num_threads())", FASTCONV_NUM_THREADS=threads
    )
    assert result.stdout.strip() == threads, result.stderr


@pytest.mark.parametrize("environment", [{}, {"FASTCONV_NUM_THREADS": ""}])
def test_default_threads_are_those_the_process_may_use(environment):
    script = "import fastconv; print(fastconv.get_num_threads())"
    result = run_python(script, **environment)
    assert int(result.stdout) == len(os.sched_getaffinity(0)), result.stderr
    script = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {script}"
    assert run_python(script, **environment).stdout.strip() == "1"


@pytest.mark.parametrize("isa", _core.available_isas())
def test_environment_sets_isa(isa):
    result = run_python("import fastconv; print(fastconv.info()['isa'])", FASTCONV_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_default_isa_is_the_best():
    for environment in ({}, {"FASTCONV_ISA": ""}):
        result = run_python("import fastconv; print(fastconv.info()['isa'])", **environment)
        assert result.stdout.strip() == _core.available_isas()[0], result.stderr


CONVOLVE = """
    import numpy as np
    import fastconv
    x, w = np.ones((4, 30, 30, 16), np.float32), np.ones((3, 3, 16, 16), np.float32)
    fastconv.conv2d(x, w)
"""
ASK = """
    import fastconv
    fastconv.info()
"""


@pytest.mark.parametrize("script", [CONVOLVE, ASK], ids=["convolve", "ask"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("FASTCONV_ISA", value) for value in ("sse9", "AVX2", "avx2 ", "7")]
    + [
        ("FASTCONV_NUM_THREADS", value)
        for value in ("0", "-1", "1025", "two", "2.5", "2 ", " ", "99999999999999999999")
    ],
)
def test_wrong_environment_is_a_value_error(name, value, script):
    result = run_python(script, **{name: value})
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith(f"ValueError: {name} must ")
    assert last.endswith(f". Received: {name}={value}")


# --- the GIL --------------------------------------------------------------------------------------


def calls(batch):
    """A call of each function, on `batch` images."""
    x = np.ones((batch, 32, 32, 16), np.float32)
    w = np.ones((3, 3, 16, 16), np.float32)
    y, argmax = fastconv.max_pool2d(x, 5, strides=1, padding="same", return_argmax=True)
    overlapping = {"strides": 1, "padding": "same"}
    return {
        "conv2d": lambda: fastconv.conv2d(x, w, padding="same"),
        "conv2d_grad_input": lambda: fastconv.conv2d_grad_input(x, w, x.shape, padding="same"),
        "conv2d_grad_filter": lambda: fastconv.conv2d_grad_filter(x, x, w.shape, padding="same"),
        "max_pool2d": lambda: fastconv.max_pool2d(x, 5, **overlapping),
        "max_pool2d_grad": lambda: fastconv.max_pool2d_grad(y, argmax, x.shape, 5, **overlapping),
    }


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def longest_pause_during(function):
    """(longest time this thread stood still, duration) while another thread runs `function`."""
    spans = []

    def body():
        start = time.perf_counter()
        function()
        spans.append((start, time.perf_counter()))

    ticks = [time.perf_counter()]
    thread = threading.Thread(target=body)
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
    thread.join()
    ticks.append(time.perf_counter())
    [(start, end)] = spans
    inside = [start, *(tick for tick in ticks if start < tick < end), end]
    return max(np.diff(inside)), end - start


@pytest.mark.parametrize("name", calls(0))
def test_gil_is_released(name):
    with running_on(threads=1):
        batch = 8
        while seconds(call := calls(batch)[name]) < 0.04 and batch < 4096:
            batch *= 2
        # A busy machine may stop this thread for long; a GIL that is held always does, for the
        # whole call. One run in which it was not proves the release.
        runs = [longest_pause_during(call) for _ in range(5)]
    assert any(pause < duration / 2 for pause, duration in runs), runs


# --- concurrent calls -----------------------------------------------------------------------------

PROBLEMS = [
    Problem((3, 13, 13, 32), 64),
    Problem((2, 28, 28, 1), 32),
    Problem((2, 20, 21, 24), 17, kernel=(5, 3), padding="same"),
    Problem((2, 20, 21, 24), 24, groups=24, strides=(2, 2), padding="same"),
]


def test_concurrent_calls_give_what_single_calls_give(isa, threads):
    cases = [(problem, normals(problem)) for problem in PROBLEMS]
    expected = [solve(*case) for case in cases]

    def body(worker):
        for i in range(6):
            which = (worker + i) % len(cases)
            assert_same_bits(solve(*cases[which]), expected[which])

    with ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(body, worker) for worker in range(8)]:
            future.result(timeout=60)


def test_threads_may_be_set_while_others_compute():
    problem = PROBLEMS[0]
    data = normals(problem)
    expected = solve(problem, data)
    stop = threading.Event()

    def change():
        threads = 1
        while not stop.is_set():
            threads = threads % 5 + 1
            fastconv.set_num_threads(threads)

    with running_on(threads=2), ThreadPoolExecutor(3) as executor:
        changing = executor.submit(change)
        try:
            futures = [
                executor.submit(lambda: [solve(problem, data) for _ in range(10)]) for _ in range(2)
            ]
            for future in futures:
                for results in future.result(timeout=60):
                    assert_same_bits(results, expected)
        finally:
            stop.set()
        changing.result(timeout=60)


def test_denormals_survive_in_the_caller(isa, threads):
    """Kernels flush them to zero; what runs after them must not."""
    tiny = np.array([1e-40], np.float32)
    solve(PROBLEMS[0], normals(PROBLEMS[0]))
    assert (tiny * np.float32(0.5))[0] > 0


# --- fork and exit --------------------------------------------------------------------------------

PREPARE = """
    import os, sys, threading
    import numpy as np
    import fastconv

    fastconv.set_num_threads(3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 20, 20, 32)).astype(np.float32)
    w = rng.standard_normal((3, 3, 32, 48)).astype(np.float32)
    expected = fastconv.conv2d(x, w).tobytes()

    def has_workers():
        tasks = "/proc/self/task"  # where the system tells
        return len(os.listdir(tasks)) > 1 if os.path.isdir(tasks) else True

    def right(_=None):
        return all(fastconv.conv2d(x, w).tobytes() == expected for _ in range(20))
"""


@pytest.mark.parametrize(
    "script",
    [
        # Parent and child both go on, the child forks again.
        """
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            good = right() and has_workers()
            if grandchild:
                good &= os.waitpid(grandchild, 0)[1] == 0
            os._exit(not good)
        assert right()
        assert os.waitpid(child, 0)[1] == 0
        """,
        # Forked while other threads compute.
        """
        stop = threading.Event()
        def compute():
            while not stop.is_set():
                right()
        threads = [threading.Thread(target=compute) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(not right())
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for thread in threads:
            thread.join()
        """,
        # The way most programs fork.
        """
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert all(pool.map(right, range(9)))
        """,
    ],
    ids=["parent-and-child", "while-computing", "multiprocessing"],
)
def test_fork_after_use(script):
    result = run_python(textwrap.dedent(PREPARE) + textwrap.dedent(script))
    assert result.returncode == 0, result.stderr


def test_exit_waits_for_threads():
    script = """
        def compute():
            assert right()
            print("right")
        threading.Thread(target=compute).start()
    """
    result = run_python(textwrap.dedent(PREPARE) + textwrap.dedent(script))
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


def test_exit_while_daemons_compute():
    """They want the GIL back from an interpreter that is gone: no reason to end in an abort."""
    script = """
        import time
        def compute():
            while True:
                fastconv.conv2d(x[:1], w)
        for _ in range(4):
            threading.Thread(target=compute, daemon=True).start()
        time.sleep(0.05)
    """
    for _ in range(3):
        result = run_python(textwrap.dedent(PREPARE) + textwrap.dedent(script))
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
