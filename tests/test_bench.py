"""``fastconv bench``: its problems, references and statistics, and whole runs of it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

import bench_peers
import fastconv
from fastconv import _core
from fastconv.bench import compare, files, reference, statistics, suites
from fastconv.bench.problem import ProblemError, parse, parse_direction, parse_lines
from fastconv.bench.session import Conditions
from fastconv.cli import main

SMALL = "mb2ic3ih9iw8oc4oh9ow8kh3ph1"
# Odd in every way a problem can be: groups, strides, dilations, padding that differs by side.
ODD = [
    SMALL,
    "mb1ic1ih7oc5kh3",
    "mb2g2ic4ih8iw9oc6kh3kw2sh2sw1ph1pw0",
    "mb1g6ic6ih11oc6oh6kh3sh2",  # padded at the bottom and the right alone
    "mb1g3ic3ih6oc6kh3ph1",  # a multiplier of 2
    "mb2ic4ih10iw13oc3kh3kw2dh1dw2ph2",
    "mb1ic2ih9oc2kh2sh3",  # strides beyond the filter
    "mb3ic5ih4iw3oc2kh2kw3",  # one column of output
]
POOLS = ["mb2ic3ih8kh2sh2", "mb1ic4ih9iw7kh3sh2ph1", "mb1ic2ih5iw6oh3ow3kh2kw3sh2"]


# --- problems -------------------------------------------------------------------------------------


def test_benchdnn_string():
    problem = parse('mb32ic64ih56_oc64oh56_kh3ph1n"layer"')
    assert problem.x_shape == (32, 56, 56, 64)
    assert problem.w_shape == (3, 3, 64, 64)
    assert problem.y_shape == (32, 56, 56, 64)
    assert problem.sides == ((1, 1), (1, 1))
    assert problem.name == "layer"
    assert problem.flops() == 2 * 32 * 56 * 56 * 64 * 64 * 9
    assert str(problem) == "mb32ic64ih56oc64oh56kh3ph1"


def test_padding_follows_from_the_output():
    problem = parse("ic1ih5oc1oh3kh3sh2")
    assert problem.sides == ((1, 1), (1, 1))
    problem = parse("ic1ih6oc1oh3kh3sh2ph0")
    assert problem.sides == ((0, 1), (0, 1))


def test_dilation_counts_from_zero_as_in_benchdnn():
    problem = parse("ic1ih9oc1kh3dh1")
    assert problem.dilations == (2, 2)
    assert problem.oh == 5


@pytest.mark.parametrize("text", ODD + POOLS)
def test_string_and_back(text):
    problem = parse(text)
    assert parse(str(problem)) == problem


@pytest.mark.parametrize("name", [*suites.SUITES, "random:3:5"])
def test_suites_can_be_written_and_read(name):
    problems = suites.suite(name)
    assert len(set(problems)) == len(problems) > 3
    for problem in problems:
        assert parse(str(problem)) == problem


def test_random_suite_depends_on_its_seed():
    assert suites.suite("random:3") == suites.suite("random:3")
    assert suites.suite("random:3") != suites.suite("random:4")
    assert len(suites.suite("random:3:7")) == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "ic3ih8",
        "ic3ih8oc4kh3x",
        "ic3ic3ih8oc4kh3",
        "ic3ih2oc4kh3",
        "ic0ih8oc4kh3",
        "mb0ic3ih8oc4kh3",
        "ic3ih8oc4kh3sh0",
        "g2ic3ih8oc4kh3",
        "ic3ih8kh3dh1",
        "ic3ih8oc4kh3ph3",
        "ic3ih8oc4oh90kh3",
    ],
)
def test_wrong_problem_says_what_was_received(text):
    with pytest.raises(ProblemError, match="Received: "):
        parse(text)


@pytest.mark.parametrize("name", ["nonsense", "mnist:1", "random:x", "random:1:2:3"])
def test_wrong_suite(name):
    with pytest.raises(ProblemError, match="Received: "):
        suites.suite(name)


def test_file_of_benchdnn():
    lines = ["# a comment", "--dir=FWD_D", SMALL, "", f"--mode=P --dir=BWD_D,bwd_w {POOLS[0]} # x"]
    assert parse_lines(lines) == [
        (parse(SMALL), ("fprop",)),
        (parse(POOLS[0]), ("dgrad", "wgrad")),
    ]
    assert parse_direction("BWD_W") == "wgrad"
    with pytest.raises(ProblemError, match="Received: 'sideways'"):
        parse_direction("sideways")


def test_drawn_data_has_no_small_product_and_no_tie():
    problem = parse("mb4ic3ih16oc4kh3")
    arrays = problem.draw()
    for name in ("x", "w", "dy"):
        magnitudes = np.abs(arrays[name])
        assert 0.5 <= magnitudes.min() <= magnitudes.max() <= 1
        assert (arrays[name] > 0).any()
        assert (arrays[name] < 0).any()
    assert (problem.draw()["x"] == arrays["x"]).all()
    x = parse(POOLS[0]).draw()["x"]
    windows = x.reshape(2, 4, 2, 4, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 4)
    assert all(len(set(window)) == 4 for window in windows)


# --- reference ------------------------------------------------------------------------------------


def by_core(problem, direction, arrays):
    """By the reference in C++, which the kernels are tested with."""
    (top, bottom), (left, right) = problem.sides
    geometry = {
        "strides": problem.strides,
        "padding": ("explicit", (top, bottom, left, right)),
        "data_format": "channels_last",
    }
    x, dy = arrays["x"], arrays["dy"]
    core = _core.reference
    if problem.is_pool:
        geometry["pool_size"] = (problem.r, problem.s)
        y, argmax = core.max_pool2d(x, True, **geometry)
        return y if direction == "fprop" else core.max_pool2d_grad(dy, argmax, x.shape, **geometry)
    geometry |= {
        "dilation_rate": problem.dilations,
        "groups": problem.groups,
        "activation": "linear",
    }
    w = arrays["w"]
    if direction == "fprop":
        return core.conv2d(x, w, None, **geometry)
    if direction == "dgrad":
        return core.conv2d_grad_input(dy, w, x.shape, None, **geometry)
    return core.conv2d_grad_filter(x, dy, w.shape, None, False, **geometry)


@pytest.mark.parametrize("text", ODD + POOLS)
def test_reference_is_right(text, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK", 500)  # several chunks even here
    problem = parse(text)
    for direction in problem.directions:
        arrays = problem.draw(1)
        right = reference.expected(problem, direction, arrays)
        assert right.dtype == np.float64
        result = by_core(problem, direction, arrays)
        assert reference.error(result, right) <= 1e-6
        assert reference.error(result, right) <= reference.tolerance(problem, direction)


@pytest.mark.parametrize("text", ODD)
def test_a_lost_product_is_beyond_the_tolerance(text):
    problem = parse(text)
    for direction in problem.directions:
        right = reference.expected(problem, direction, problem.draw())
        result = right.copy()
        result[-1, -1, -1, -1] += 0.25  # the least that the product of two drawn values can be
        assert reference.error(result, right) > reference.tolerance(problem, direction)


def test_error_knows_nan_and_shapes():
    right = np.ones((2, 3))
    assert reference.error(right, right) == 0
    assert reference.error(np.ones((3, 2)), right) == float("inf")
    assert reference.error(np.full((2, 3), np.nan), right) == float("inf")
    assert reference.error(right * 1.5, right) == 0.5


# --- statistics -----------------------------------------------------------------------------------


def records(**medians):
    """Implementations whose turns scatter by 10 % around these nanoseconds."""
    scatter = (0.9, 1.0, 1.0, 1.1, 1.0)
    return {
        name: {"kernel": statistics.summary([[value * s] * 3 for s in scatter])}
        for name, value in medians.items()
    }


def test_summary():
    summary = statistics.summary([[1, 2, 3], [5], [4, 4]])
    assert summary["turns"] == [2, 5, 4]
    assert summary["median"] == 4
    assert summary["least"] == 1
    assert summary["samples"] == 6


def test_ratio_is_to_the_best_peer_and_taken_within_rounds():
    ratio = statistics.ratio(records(fastconv=100, slow=300, fast=200), "fastconv", "kernel")
    assert ratio["peer"] == "fast"
    # All scatter alike, as a disturbed machine makes them: the ratio does not scatter.
    assert ratio["low"] == pytest.approx(2)
    assert ratio["high"] == pytest.approx(2)
    assert statistics.ratio(records(fastconv=100), "fastconv", "kernel") is None
    assert statistics.ratio(records(fast=100), "fastconv", "kernel") is None


def test_interval_holds_the_median_and_is_the_same_each_time():
    values = [1.0, 1.1, 0.9, 1.3, 1.05]
    low, median, high = statistics.interval(values)
    assert low <= median == 1.05 <= high
    assert statistics.interval(values) == (low, median, high)


def test_shares():
    result = {"flops": 2000, "read": 100, "written": 50}
    limits = {"flops": 4e9, "read": 1e9, "write": 0.5e9}
    rates = files.shares(result, 1000, limits)
    assert rates == {"gflops": 2, "peak": 0.5, "bandwidth": pytest.approx(0.2)}
    assert files.shares(result | {"flops": 0}, 1000, limits)["gflops"] is None
    assert files.shares(result, 1000, None)["peak"] is None


# --- compare --------------------------------------------------------------------------------------


def run_of(**times):
    """A run in which our kernel took these nanoseconds on problems of these names."""
    results = [
        {
            "problem": SMALL,
            "name": name,
            "direction": "fprop",
            "implementations": records(fastconv=nanoseconds),
        }
        for name, nanoseconds in times.items()
    ]
    conditions = {"cpu": "a", "threads": 2, "limits": {"flops": 1e9}}
    return {"format": files.FORMAT, "conditions": conditions, "results": results}


def test_compare_names_regressions_beyond_noise():
    found = compare.compare(
        run_of(same=100, slower=100, little=100, faster=100, gone=100),
        run_of(same=100, slower=150, little=105, faster=50, new=100),
    )
    assert [c.name for c in found.regressions] == ["slower"]
    assert [c.name for c in found.improvements] == ["faster"]
    assert len(found.changes) == 4
    assert len(found.missing) == 1
    assert found.warnings == []


def test_compare_takes_overlapping_quartiles_for_noise():
    old, new = run_of(a=100), run_of(a=130)
    old["results"][0]["implementations"]["fastconv"]["kernel"]["high"] = 140
    assert compare.compare(old, new).regressions == []


def test_compare_warns_of_other_conditions():
    new = run_of(a=100)
    new["conditions"] = {"cpu": "b", "threads": 1, "filter": "plain", "limits": {"flops": 2e9}}
    warnings = " ".join(compare.compare(run_of(a=100), new).warnings)
    assert "cpu differs" in warnings
    assert "threads differs" in warnings
    assert "filter differs" in warnings
    assert "FMA peak" in warnings


def test_compare_exits_with_1_where_something_became_slower(tmp_path):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, run in zip(paths, (run_of(a=100, b=100), run_of(a=200, b=100)), strict=True):
        files.write_json(path, run)
    result = invoke("--compare", *paths)
    assert result.exit_code == 1
    assert SMALL in result.output
    assert "2.00" in result.output
    assert invoke("--compare", paths[1], paths[0]).exit_code == 0
    assert invoke("--compare", *paths, "--threshold", 1.5).exit_code == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99, "results": []}'])
def test_compare_refuses_other_files(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    result = invoke("--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert result.exit_code == 1
    assert "Error: " in result.output


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def peers(monkeypatch, tmp_path):
    directory = tmp_path / "peers"
    directory.mkdir()
    bench_peers.install(monkeypatch, directory)
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], prog_name="fastconv")


# Of a longer time than the calls take: who overruns it many times, as on a busy machine, sits out.
QUICK = ("--rounds", 3, "--seconds", 0.03)


def test_a_run_is_written_shown_drawn_and_repeated(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    result = invoke(
        *QUICK, SMALL, POOLS[0], "--impl", "fastconv,right_peer,fprop_peer,no_such_module",
        "--json", path, "--csv", tmp_path / "run.csv", "--report", tmp_path / "page.md",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "no_such_module is left out" in result.output

    run = files.read_json(path)
    assert run["complete"]
    assert [(r["problem"], r["direction"]) for r in run["results"]] == [
        (SMALL, "fprop"),
        (SMALL, "dgrad"),
        (SMALL, "wgrad"),
        (POOLS[0].replace("kh", "oh4kh"), "fprop"),
        (POOLS[0].replace("kh", "oh4kh"), "dgrad"),
    ]
    limits = run["conditions"]["limits"]
    assert min(limits.values()) > 1e8
    first, second = run["results"][:2]
    assert set(first["implementations"]) == {"fastconv", "right_peer", "fprop_peer"}
    assert second["left_out"]["fprop_peer"] == "fprop alone"
    ours = first["implementations"]["fastconv"]
    assert (
        ours["algorithm"]
        == fastconv.explain((2, 9, 8, 3), (3, 3, 3, 4), padding=((1, 1), (1, 1)))["algorithm"]
    )
    assert ours["kernel"]["least"] <= ours["kernel"]["median"]
    assert len(ours["kernel"]["turns"]) == 3
    assert 0 <= ours["error"] < 1e-6
    peer = first["implementations"]["right_peer"]
    assert peer["kernel"]["estimated"]
    assert peer["call"]["median"] / 2 <= peer["kernel"]["median"] <= peer["call"]["median"]
    assert first["ratio"]["low"] <= first["ratio"]["median"] <= first["ratio"]["high"]

    assert first["repeat"].startswith("fastconv bench --dir fprop --threads ")
    repeated = invoke(*QUICK, *first["repeat"].split()[2:], "--json", path)
    assert repeated.exit_code == 0, repeated.output
    assert len(files.read_json(path)["results"]) == 1

    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 + 2
    assert float(rows[0]["kernel_median_us"]) > 0
    for name in ("roofline", "layers-problems", "ratios", "errors"):
        assert (tmp_path / "page" / f"{name}.svg").read_text().startswith("<?xml")
    page = (tmp_path / "page.md").read_text()
    assert SMALL in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line[line.index("(") + 1 : -1]).exists()


def test_plots_of_an_earlier_run(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    assert invoke(*QUICK, POOLS[0], "--impl", "fastconv", "--json", path).exit_code == 0
    result = invoke("--from", path, "--plot", tmp_path / "plots", "--brief")
    assert result.exit_code == 0, result.output
    drawn = {file.name for file in (tmp_path / "plots").iterdir()}
    assert drawn == {"layers-problems.svg", "layers-problems.png"}  # no operations, no peer


def test_a_wrong_kernel_is_refused(tmp_path):
    result = invoke(*QUICK, SMALL, "--impl", "fastconv,wrong_peer", "--json", tmp_path / "run.json")
    assert result.exit_code == 1
    assert "wrong_peer computes fprop" in result.output
    assert SMALL in result.output
    assert "GFLOP/s" not in result.output
    assert not (tmp_path / "run.json").exists()


def test_our_own_wrong_kernel_is_refused(tmp_path, monkeypatch):
    """The same with fastconv itself, its filter's last tap forgotten."""
    (tmp_path / "peers" / "sitecustomize.py").write_text(
        "import fastconv\n"
        "right = fastconv.conv2d\n"
        "def wrong(x, w, *args, **options):\n"
        "    w = w.copy()\n"
        "    w[-1, -1, -1, -1] = 0\n"
        "    return right(x, w, *args, **options)\n"
        "fastconv.conv2d = wrong\n"
    )
    result = invoke(*QUICK, SMALL, "--impl", "fastconv", "--filter", "plain")
    assert result.exit_code == 1
    assert "fastconv computes fprop" in result.output


def test_one_that_dies_is_left_out_and_named(tmp_path):
    path = tmp_path / "run.json"
    result = invoke(*QUICK, SMALL, "--impl", "fastconv,dying_peer", "--json", path)
    assert result.exit_code == 0, result.output
    run = files.read_json(path)
    assert "status 7" in run["conditions"]["absent"]["dying_peer"]
    assert set(run["results"][0]["implementations"]) == {"fastconv"}


def test_who_is_left_out_of_a_case_is_told(tmp_path):
    result = invoke(
        *QUICK, SMALL, "--dir", "fprop,dgrad", "--impl", "fastconv,fprop_peer", "--brief"
    )
    assert result.exit_code == 0, result.output
    assert "fprop_peer is left out in 1 of 2 cases: fprop alone" in result.output
    assert "ratio: " in result.output
    assert "bandw.: " not in result.output, "of a column that --brief does not show"


def test_what_memory_cannot_hold_loses_no_other_case(tmp_path):
    path = tmp_path / "run.json"
    huge = "mb2147483647ic64ih99oc64kh3ph1"
    result = invoke(*QUICK, huge, SMALL, "--dir", "fprop", "--impl", "fastconv", "--json", path)
    assert result.exit_code == 1
    assert "fastconv could not be measured in 1 of 2 cases" in result.output
    assert "no room for its arrays" in result.output
    lost, kept = files.read_json(path)["results"]
    assert (set(lost["implementations"]), set(kept["implementations"])) == (set(), {"fastconv"})


def test_a_variable_that_only_a_run_shows_to_be_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCONV_GUARD_PAGES", "2")
    result = invoke(*QUICK, SMALL, "--dir", "fprop", "--impl", "fastconv")
    assert result.exit_code == 1
    assert "FASTCONV_GUARD_PAGES must be 0 or 1" in result.output


def test_an_algorithm_that_does_not_serve_is_told():
    arguments = ("--algorithm", "depthwise", "--dir", "fprop", "--impl", "fastconv")
    result = invoke(*QUICK, SMALL, *arguments)
    assert "depthwise does not serve 1 of 1 cases, computed by: " in result.output


def test_a_case_is_repeated_as_it_was_measured():
    conditions = Conditions(2, seed=3, rounds=4)
    assert conditions.options == "--threads 2 --rounds 4 --seed 3"
    assert Conditions(1).options == "--threads 1"


def test_nobody_to_measure():
    result = invoke(SMALL, "--impl", "no_such_module")
    assert result.exit_code == 1
    assert "No implementation can be measured" in result.output


def test_interrupted_run_keeps_what_was_measured(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "run.json"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "fastconv", "bench", "--suite", "random:1:10", "--impl",
            "fastconv,slow_peer", "--rounds", "3", "--seconds", "0.01", "--json", str(path),
        ],
        env={**os.environ, "BENCH_PEER_MARKER": str(marker)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that a shell runs in the background would hand down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # The third case is begun (and a floor measured): two are done.
        if marker.exists() and len(marker.read_text().splitlines()) >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Interrupted" in output
    run = json.loads(path.read_text())
    assert not run["complete"]
    assert 1 <= len(run["results"]) < run["planned"] == 30


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--suite", "nonsense"],
        ["--dir", "sideways"],
        ["--dir", "wgrad", POOLS[0]],
        ["--threads", "0"],
        ["--dtype", "float64"],
        ["--layout", "chwn"],
        ["--isa", "sse"],
        ["--cache", "hot"],
        ["--file", "no-such-file"],
        ["--compare", "no-such-file", "no-such-file"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage: fastconv bench" in result.output


def test_plots_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(SMALL, "--plot", "nowhere")
    assert result.exit_code == 1
    assert "pip install 'fastconv[plot]'" in result.output


@pytest.mark.parametrize(
    "options",
    [
        ("--layout", "nchw", "--threads", "1"),
        ("--isa", "scalar", "--cache", "cold"),
        ("--accuracy", "fast", "--algorithm", "direct"),
        ("--filter", "plain", "--algorithm", "direct"),
    ],
    ids=" ".join,
)
def test_options_reach_the_kernels(options, tmp_path):
    path = tmp_path / "run.json"
    result = invoke(
        *QUICK, *options, SMALL, POOLS[1], "--impl", "fastconv,right_peer", "--json", path
    )
    assert result.exit_code == 0, result.output
    run = files.read_json(path)
    for option, value in zip(options[::2], options[1::2], strict=True):
        if option != "--cache":
            assert f"{option} {value}" in run["results"][0]["repeat"]
    if "--isa" in options:
        assert run["conditions"]["versions"]["isa"] == "scalar"
    if "--algorithm" in options:
        assert run["results"][0]["implementations"]["fastconv"]["algorithm"] == "direct"


def test_installed_peers_compute_odd_problems(tmp_path):
    """Each peer that is installed, checked against float64 on all of them."""
    (tmp_path / "odd.txt").write_text("\n".join(ODD + POOLS))
    path = tmp_path / "run.json"
    result = invoke(
        "--rounds", 1, "--seconds", 0.001, "--file", tmp_path / "odd.txt", "--json", path
    )
    assert result.exit_code == 0, result.output
    run = files.read_json(path)
    assert len(run["results"]) == 3 * len(ODD) + 2 * len(POOLS)
    assert all("fastconv" in r["implementations"] for r in run["results"])


# --- what the core offers the benchmark -----------------------------------------------------------


def test_timed_kernels_compute_what_the_kernels_do(rng):
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    w = rng.standard_normal((3, 3, 3, 4)).astype(np.float32)
    options = {
        "strides": (1, 1),
        "padding": ("valid", (0, 0, 0, 0)),
        "dilation_rate": (1, 1),
        "groups": 1,
        "activation": "linear",
        "data_format": "channels_last",
    }
    _core.timed.set_calls(5)
    timed = _core.timed.conv2d(x, w, None, **options)
    np.testing.assert_array_equal(timed, _core.conv2d(x, w, None, **options))
    times = _core.timed.nanoseconds()
    assert len(times) == 5
    assert min(times) > 0
    with pytest.raises(ValueError, match="Received: calls=0"):
        _core.timed.set_calls(0)


def test_measured_limits(isa, threads):
    assert _core.timed.flops(0.01) > 1e8
    for stream in ("read", "write", "copy"):
        assert _core.timed.bandwidth(stream, 1 << 22, 0.01) > 1e8
    with pytest.raises(ValueError, match="Received: stream='sideways'"):
        _core.timed.bandwidth("sideways", 1 << 20, 0.01)
