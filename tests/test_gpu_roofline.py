"""``fastconv roofline``: an estimate that cannot be beyond what it is estimated from."""

import pytest
from click.testing import CliRunner

from fastconv.bench import suites
from fastconv.bench.gpu_roofline import GPUS, ceiling, moved_bytes
from fastconv.bench.problem import parse
from fastconv.cli import main

DTYPES = ("float32", "tf32", "float16")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ceilings_are_below_the_roofs(gpu, dtype):
    for name in ("mnist", "resnet50", "vgg16", "mobilenetv2", "grouped", "pooling", "random"):
        for problem in suites.suite(name):
            for direction in problem.directions:
                best = ceiling(problem, direction, gpu, dtype)
                assert best.seconds >= 0.999 * best.bytes / (gpu.bandwidth * 1e12)
                assert 0 < best.balance <= 1
                # dgrad has no products with padding, nor with the zeros that a stride puts in.
                if direction != "dgrad":
                    assert 0 < best.useful <= 1
                    assert best.tflops <= gpu.peaks[dtype] * 1.001


def test_a_layer_by_hand():
    """2 x 8 x 8 pixels, 9 taps of 64 channels, 128 filters: one tile of 128 x 128 x 576."""
    problem = parse("mb2ic64ih8oc128kh3ph1")
    best = ceiling(problem, "fprop", GPUS["a100"], "float16")
    flops = 2 * 128 * 128 * 576
    assert best.flops == flops
    # Four tiles of 64 x 64 keep four multiprocessors busy, one of 128 x 128 a single one.
    assert best.kernel == "tensor_core_gemm 64x64"
    assert best.useful == 1
    assert best.balance == pytest.approx(4 / 108)
    assert best.seconds == pytest.approx(flops / (312e12 * 4 / 108))
    assert best.bound == "arithmetic"
    assert best.bytes == 2 * (2 * 64 * 64 + 9 * 64 * 128 + 2 * 64 * 128)


def test_pooling_moves_its_argmax():
    problem = next(iter(suites.suite("pooling")))
    x, y = 32 * 26 * 26 * 32, 32 * 13 * 13 * 32
    assert moved_bytes(problem, "fprop", "float16") == 2 * (x + y)
    assert moved_bytes(problem, "dgrad", "float16") == 2 * (x + y) + y
    assert moved_bytes(problem, "dgrad", "float32") == 4 * (x + y) + y


def test_command():
    run = CliRunner().invoke(main, ["roofline", "--suite", "mnist", "--gpu", "h100"])
    assert run.exit_code == 0
    assert "H100 SXM, float16: estimated from published peaks, not measured" in run.output
    assert run.output.count("| conv2 (batch 256) |") == 3
    table = [line for line in run.output.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--suite", "lenet"], "A suite must be one of"),
        (["--dir", "fprop,sideways"], "Received: 'fprop,sideways'"),
        (["--gpu", "abacus"], "abacus"),
    ],
)
def test_bad_arguments(arguments, text):
    run = CliRunner().invoke(main, ["roofline", *arguments])
    assert run.exit_code == 2
    assert text in run.output
