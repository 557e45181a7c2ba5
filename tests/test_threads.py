"""Threads and instruction sets as a user sees them: settings, the GIL, concurrent calls, fork."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    granted = _core.cgroup_cpus() or 1024
    assert int(result.stdout) == min(len(os.sched_getaffinity(0)), granted), result.stderr
    script = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {script}"
    assert run_python(script, **environment).stdout.strip() == "1"


@pytest.mark.skipif(shutil.which("taskset") is None, reason="the machine has no taskset")
def test_taskset_is_respected():
    script = "import fastconv; print(fastconv.get_num_threads())"
    cpu = str(min(os.sched_getaffinity(0)))
    result = subprocess.run(
        ["taskset", "-c", cpu, sys.executable, "-c", script],
        env={name: value for name, value in os.environ.items() if name != "FASTCONV_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.strip() == "1", result.stderr


def test_threads_follow_an_affinity_that_shrinks_later():
    """Workers that were there before must not go back to CPUs that were taken away."""
    script = """
        right()
        cpus = os.sched_getaffinity(0)
        if len(cpus) > 1:
            for task in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(task), {min(cpus)})
            right()
            for task in os.listdir("/proc/self/task"):
                assert os.sched_getaffinity(int(task)) == {min(cpus)}
    """
    result = run_python(textwrap.dedent(PREPARE) + textwrap.dedent(script))
    assert result.returncode == 0, result.stderr


V2 = "29 23 0:26 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 25 0:27 {root} {point} rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"

# What /proc/self/cgroup and mountinfo say, the limits' files, and the CPUs that follow.
CGROUPS = {
    "no cgroups": ("", "", {}, 0),
    "v2, two CPUs": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "v2, none": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "max 100000\n"},
        0,
    ),
    "v2, rounded up": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "250000 100000\n"},
        3,
    ),
    "v2, a fraction is one": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "1000 100000\n"},
        1,
    ),
    "v2, another period": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "30000 10000\n"},
        3,
    ),
    "v2, own": (
        "0::/a/b\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/c/cpu.max": "1 1\n"},
        4,
    ),
    "v2, an ancestor's is less": (
        "0::/a/b\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        },
        2,
    ),
    "v2, only the container's is mounted": (
        "0::/docker/x/inner\n",
        V2.format(root="/docker/x", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/inner/cpu.max": "max 100000\n", "sys/fs/cgroup/cpu.max": "500000 100000\n"},
        5,
    ),
    "v2, outside of what is mounted": (
        "0::/../other\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "600000 100000\n"},
        6,
    ),
    "v2 beside v1, at a place with a blank": (
        "5:memory:/m\n0::/a\n",
        V1_MEMORY + "\n" + V2.format(root="/", point="/sys/fs/my\\040group"),
        {"sys/fs/my group/a/cpu.max": "700000 100000\n"},
        7,
    ),
    "v1": (
        "5:memory:/m\n4:cpu,cpuacct:/a\n",
        V1_MEMORY + "\n" + V1.format(root="/", point="/sys/fs/cgroup/cpu"),
        {
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1, none": (
        "4:cpu,cpuacct:/a\n",
        V1.format(root="/", point="/sys/fs/cgroup/cpu"),
        {
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        },
        0,
    ),
    "v1, only the container's is mounted": (
        "4:cpu,cpuacct:/docker/x\n",
        V1.format(root="/docker/x", point="/sys/fs/cgroup/cpu"),
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "v1, another's is mounted": (
        "4:cpu,cpuacct:/a\n",
        V1.format(root="/docker/x", point="/sys/fs/cgroup/cpu"),
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "nonsense": (
        "0::\n:::\nx\n0::/a",
        "x\n - \n1 2 3 - cgroup2\n" + V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "many\n", "sys/fs/cgroup/a/cpu.max": "100000 0\n"},
        0,
    ),
    "larger than any machine": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "9000000000000000000 1\n"},
        2**31 - 1,
    ),
    "beyond 64 bits": (
        "0::/\n",
        V2.format(root="/", point="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "99999999999999999999 1\n"},
        0,
    ),
}


@pytest.mark.parametrize(("cgroup", "mounts", "files", "cpus"), CGROUPS.values(), ids=CGROUPS)
def test_cpu_quota_of_cgroups(tmp_path, cgroup, mounts, files, cpus):
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts, **files}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert _core.cgroup_cpus(str(tmp_path)) == cpus


def test_no_root_no_quota(tmp_path):
    assert _core.cgroup_cpus(str(tmp_path / "nowhere")) == 0


def test_quota_of_a_real_cgroup():
    """Where this process may make cgroups of its own."""
    made, limits = make_cgroup()
    if made is None:
        pytest.skip(f"no cgroup with a CPU quota can be made here: {limits}")
    try:
        for quota, cpus in ((50_000, 1), (100_000, 1), (150_000, 2)):
            limits(quota)
            script = f"""
                import os, pathlib
                pathlib.Path({str(made / "cgroup.procs")!r}).write_text(str(os.getpid()))
                import fastconv
                from fastconv import _core
                print(_core.cgroup_cpus(), fastconv.get_num_threads())
            """
            result = run_python(script)
            usable = min(cpus, len(os.sched_getaffinity(0)))
            assert result.stdout.split() == [str(cpus), str(usable)], result.stderr
    finally:
        made.rmdir()


def make_cgroup():
    """(its directory, a function that sets its quota), or (None, why there is none)."""
    v2, v1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu")
    base = v1 if v1.is_dir() else v2
    made = base / f"fastconv-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        return None, error
    try:
        if base == v1:
            (made / "cpu.cfs_period_us").write_text("100000")

            def limits(quota):
                (made / "cpu.cfs_quota_us").write_text(str(quota))
        else:

            def limits(quota):
                (made / "cpu.max").write_text(f"{quota} 100000")

        limits(100_000)
        return made, limits
    except OSError as error:
        made.rmdir()
        return None, error


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
    assert_refused(script, name, value)


@pytest.mark.parametrize("value", ["yes", "10", "1 "])
def test_wrong_flag_is_a_value_error(value):
    assert_refused(CONVOLVE, "FASTCONV_GUARD_PAGES", value)


def assert_refused(script, name, value):
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
        while min(seconds(call := calls(batch)[name]) for _ in range(3)) < 0.04 and batch < 4096:
            batch *= 2
        # A busy machine may stop this thread for long; a GIL that is held always does, for the
        # whole call. One run in which it was not proves the release.
        runs = []
        for _ in range(40):
            pause, duration = longest_pause_during(call)
            runs.append((pause, duration))
            if pause < duration / 2:
                return
    raise AssertionError(runs)


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


def every_function():
    """A small call of every function that computes, each with results as a list of arrays."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((3, 17, 19, 8)).astype(np.float32)
    w = rng.standard_normal((3, 3, 8, 20)).astype(np.float32)
    bias = rng.standard_normal(20).astype(np.float32)
    y = fastconv.conv2d(x, w, bias, padding="same", activation="relu")
    relu = {"padding": "same", "activation": "relu", "output": y}
    pooled, argmax = fastconv.max_pool2d(x, 3, strides=2, return_argmax=True)
    fused, taps = fastconv.conv2d_max_pool2d(x, w, bias, padding="same", return_argmax=True)
    return {
        "conv2d": lambda: [fastconv.conv2d(x, w, bias, padding="same")],
        "conv2d_grad_input": lambda: [fastconv.conv2d_grad_input(y, w, x.shape, **relu)],
        "conv2d_grad_filter": lambda: fastconv.conv2d_grad_filter(
            x, y, w.shape, return_bias_grad=True, **relu
        ),
        "conv2d_int8": lambda: [
            fastconv.conv2d_int8(x, *fastconv.quantize_filter(w), bias, padding="same")
        ],
        "max_pool2d": lambda: fastconv.max_pool2d(x, 3, strides=2, return_argmax=True),
        "max_pool2d_grad": lambda: [
            fastconv.max_pool2d_grad(pooled, argmax, x.shape, 3, strides=2)
        ],
        "avg_pool2d": lambda: [fastconv.avg_pool2d(x, 3, strides=2)],
        "avg_pool2d_grad": lambda: [fastconv.avg_pool2d_grad(pooled, x.shape, 3, strides=2)],
        "conv2d_max_pool2d": lambda: fastconv.conv2d_max_pool2d(
            x, w, bias, padding="same", return_argmax=True
        ),
        "conv2d_max_pool2d_grad": lambda: fastconv.conv2d_max_pool2d_grad(
            x, w, fused, fused, taps, padding="same"
        ),
    }


def test_sixteen_threads_at_once(isa, threads):
    """Each begins with another function: all run beside one another."""
    functions = every_function()
    assert set(functions) == {name for name in fastconv.__all__ if re.search("conv|pool", name)}
    expected = {name: [a.tobytes() for a in call()] for name, call in functions.items()}
    names = list(functions)
    start = threading.Barrier(16)

    def body(worker):
        start.wait(timeout=60)
        for i in range(3 * len(names)):
            name = names[(worker + i) % len(names)]
            assert [a.tobytes() for a in functions[name]()] == expected[name], name
        return 3 * len(names)

    with ThreadPoolExecutor(16) as executor:
        futures = [executor.submit(body, worker) for worker in range(16)]
        assert sum(future.result(timeout=60) for future in futures) == 16 * 3 * len(names)


def test_settings_may_change_while_others_compute():
    """No call waits for ever or goes wrong; accuracy and algorithm decide between right results."""
    functions = every_function()
    expected = {name: call() for name, call in functions.items()}
    stop = threading.Event()

    def change():
        turn = 0
        while not stop.is_set():
            turn += 1
            fastconv.set_accuracy(["strict", "default", "fast"][turn % 3])
            _core.set_algorithm(["auto", "direct", "winograd2"][turn % 3])
            fastconv.explain((1, 8, 8, 4), (3, 3, 4, 4))
            fastconv.info()

    with running_on(threads=2), ThreadPoolExecutor(5) as executor:
        changing = executor.submit(change)

        def body():
            for _ in range(10):
                for name, call in functions.items():
                    for result, right in zip(call(), expected[name], strict=True):
                        if result.dtype == np.float32:
                            scale = np.abs(right).max()
                            np.testing.assert_allclose(result, right, rtol=0, atol=1e-5 * scale)

        try:
            for future in [executor.submit(body) for _ in range(4)]:
                future.result(timeout=60)
        finally:
            stop.set()
        changing.result(timeout=60)


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
        # Forked while other threads hold, by turns, every lock there is: settings, measured rates,
        # kept scratch memory, packed filters.
        """
        from fastconv import _core
        stop, kept = threading.Event(), fastconv.PackedFilter(w)
        def change():
            threads = 1
            while not stop.is_set():
                threads = threads % 6 + 1
                fastconv.set_num_threads(threads)
                fastconv.set_accuracy("strict")
                fastconv.set_accuracy("default")
                fastconv.explain((1, 8, 8, 4), (3, 3, 4, 4))
        def compute():
            while not stop.is_set():
                fastconv.conv2d(x[:1, :6, :6], w)
                fastconv.conv2d(x[:1, :6, :6], fastconv.PackedFilter(w))
                fastconv.conv2d(x[:1, :6, :6], kept)
        threads = [threading.Thread(target=change), threading.Thread(target=compute)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            child = os.fork()
            if child == 0:
                fastconv.set_num_threads(2)
                fastconv.set_accuracy("default")
                fastconv.explain((1, 8, 8, 4), (3, 3, 4, 4))
                os._exit(any(fastconv.conv2d(x, f).tobytes() != expected for f in (w, kept)))
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for thread in threads:
            thread.join()
        """,
    ],
    ids=["parent-and-child", "while-computing", "multiprocessing", "while-settings-change"],
)
def test_fork_after_use(script):
    result = run_python(textwrap.dedent(PREPARE) + textwrap.dedent(script))
    assert result.returncode == 0, result.stderr


def test_fork_during_the_first_call():
    """Nothing is half set up in the child for ever."""
    script = """
        import os, threading
        import numpy as np
        import fastconv
        x, w = np.ones((2, 20, 20, 16), np.float32), np.ones((3, 3, 16, 16), np.float32)
        start = threading.Barrier(3)
        def first():
            start.wait()
            fastconv.conv2d(x, w)
        threads = [threading.Thread(target=first) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        child = os.fork()
        if child == 0:
            os._exit(int(fastconv.conv2d(x, w).max()) != 9 * 16)
        assert os.waitpid(child, 0)[1] == 0
        for thread in threads:
            thread.join()
    """
    for _ in range(3):
        result = run_python(script, FASTCONV_NUM_THREADS="3")
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_after_use(method, tmp_path):
    """A pool of processes of each kind, made while another thread of the parent computes."""
    program = tmp_path / "program.py"
    body = """
        def compute(stop):
            while not stop.is_set():
                right()

        if __name__ == "__main__":
            import multiprocessing
            stop = threading.Event()
            thread = threading.Thread(target=compute, args=[stop])
            thread.start()
            with multiprocessing.get_context(METHOD).Pool(2) as pool:
                results = pool.map(right, range(4))
            stop.set()
            thread.join()
            assert results == [True] * 4
            assert right()
            print("right")
    """
    program.write_text(f"METHOD = {method!r}\n{textwrap.dedent(PREPARE)}\n{textwrap.dedent(body)}")
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr


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


@pytest.mark.parametrize(
    "ending",
    ["pass", "sys.exit()", "os.kill(os.getpid(), signal.SIGINT)", "os._exit(0)"],
    ids=["end", "sys.exit", "interrupt", "os._exit"],
)
def test_exit_during_every_kind_of_work(ending):
    """Convolutions, settings and measurements on daemon threads; computing at exit as well."""
    script = f"""
        import atexit, signal, time
        signal.signal(signal.SIGINT, lambda *_: sys.exit())
        def compute():
            while True:
                fastconv.conv2d_grad_filter(x, fastconv.conv2d(x, w), w.shape)
        def ask():
            threads = 1
            while True:
                threads = threads % 5 + 1
                fastconv.set_num_threads(threads)
                fastconv.set_accuracy("default")
                fastconv.explain((1, 8, 8, 4), (3, 3, 4, 4))
        for work in (compute, compute, ask):
            threading.Thread(target=work, daemon=True).start()
        @atexit.register
        def last():
            assert right()
            print("right", flush=True)
        time.sleep(0.1)
        {ending}
    """
    expected = "" if "_exit(0)" in ending else "right\n"
    for _ in range(2):
        result = run_python(textwrap.dedent(PREPARE) + textwrap.dedent(script))
        assert (result.returncode, result.stdout, result.stderr) == (0, expected, "")
