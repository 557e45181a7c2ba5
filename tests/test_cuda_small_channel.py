"""small_channel: its main loops have no bank conflicts, whatever the stride and the layout."""

import json
from pathlib import Path

import numpy as np
import pytest

import cuda_builds
import cuda_support
import fastconv
from conv2d_problems import Problem, both_layouts, integers, solve_by_oracle
from cuda_support import emulating, to_device, to_host

pytestmark = cuda_support.EMULATOR_ONLY

PROBLEMS = both_layouts(
    [
        Problem((1, 18, 18, 1), 32),
        Problem((1, 17, 19, 3), 16, kernel=(7, 7), strides=(2, 2), padding="same"),
        Problem((1, 18, 18, 3), 64, padding="same"),
        Problem((1, 16, 16, 2), 24, kernel=(5, 5), padding="same"),
        Problem((1, 16, 15, 4), 32, padding="same"),
        Problem((1, 20, 20, 3), 32, kernel=(5, 5), strides=(3, 3), dilation_rate=(1, 1)),
    ]
)
SOURCE = Path(cuda_builds.CUDA, "small_channel.cuh").read_text().splitlines()


def line_of(text):
    (number,) = [i for i, line in enumerate(SOURCE, 1) if text in line]
    return f"small_channel.cuh:{number}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bank_conflicts(tmp_path, problem):
    data, options = integers(problem), {**problem.geometry, "algorithm": "small_channel"}
    expected, profile = solve_by_oracle(problem, data), tmp_path / "profile.jsonl"
    with cuda_support.using_library(cuda_support.library("check")), emulating(profile=profile):
        arrays = to_device(data)
        y = fastconv.conv2d(arrays.x, arrays.w, **options)
        dw = fastconv.conv2d_grad_filter(arrays.x, arrays.dy, problem.w_shape, **options)
        np.testing.assert_array_equal(to_host(y), expected["y"])
        np.testing.assert_array_equal(to_host(dw), expected["dw"])
    counted = [json.loads(line) for line in profile.read_text().splitlines()]
    shared = [one for one in counted if one["space"] == "shared"]
    places = {one["place"] for one in shared}
    assert line_of("const float a = from[j][column];") in places
    # Stores of the patch alone, where it is cut into classes of columns or a row ends.
    copying = line_of("column_class * patch.pitch + column] = value;")
    for one in shared:
        assert one["cost"] == one["least"] or one["place"] == copying, one
    total, least = (sum(one[name] for one in shared) for name in ("cost", "least"))
    assert total <= 1.08 * least
