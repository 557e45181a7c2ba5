"""The suites of ``fastconv bench`` under pytest-benchmark; ``--suites mnist,resnet50`` chooses.

One library after the other, for pytest-benchmark's statistics and its comparison of runs; ratios to
believe come from ``fastconv bench``, which lets the libraries take turns.
"""

import pytest

import fastconv
from fastconv.bench import reference, suites
from fastconv.bench.adapters import Unsupported, find


def pytest_generate_tests(metafunc):
    names = metafunc.config.getoption("--suites").split(",")
    cases = dict.fromkeys(
        (problem, direction)
        for name in names
        for problem in suites.suite(name)
        for direction in problem.directions
    )
    ids = [f"{direction} {problem}" for problem, direction in cases]
    metafunc.parametrize(("problem", "direction"), cases, ids=ids)


@pytest.fixture
def implementation(library):
    conditions = {
        "threads": fastconv.get_num_threads(),
        "layout": "nhwc",
        "isa": None,
        "algorithm": None,
        "accuracy": None,
        "seconds": 0.1,
    }
    return _implementation(library, conditions)


_FOUND = {}


def _implementation(library, conditions):
    # TensorFlow's threads can be set but once.
    if library not in _FOUND:
        _FOUND[library] = find(library).Implementation(conditions)
    return _FOUND[library]


def test_suites(benchmark, library, implementation, problem, direction):
    benchmark.group = f"{direction} {problem}"
    benchmark.name = library
    arrays = problem.draw()
    try:
        case = implementation.prepare(problem, direction, arrays)
    except Unsupported as reason:
        pytest.skip(str(reason))
    right = reference.expected(problem, direction, arrays)
    assert reference.error(case.result(), right) <= reference.tolerance(problem, direction)
    benchmark(case.call)
