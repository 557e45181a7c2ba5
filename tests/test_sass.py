"""What nvcc makes of the CUDA kernels: no spills, hot loops that multiply, wide reads."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import cuda_builds

sys.path.insert(0, str(cuda_builds.ROOT / "tools"))
import sass

FIGURES = {
    "registers": 128,
    "spilled_bytes": 0,
    "local_accesses": 0,
    "shared_bytes": 16896,
    "threads": 256,
    "blocks": 2,
    "loop": 588,
    "multiply": 512,
    "memory": {"LDG.128": 2, "LDS.128": 33, "STS.32": 4},
}
GEMM = "simt_gemm_kernel<float, fprop, nhwc, SimtTile<128, 128>, 4>"


# One architecture on every run, as one takes most of a minute.
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, marks=() if a == 80 else pytest.mark.sweep, id=f"sm_{a}")
        for a in sass.ARCHITECTURES
    ],
)
def test_kernels(architecture):
    try:
        nvcc, *_ = map(sass.find_tool, ("nvcc", "cuobjdump", "nvdisasm"))
    except sass.MissingTool as error:
        pytest.skip(str(error))
    _, cubins = cuda_builds.build_by_nvcc(nvcc, architecture)
    results = {}
    with ThreadPoolExecutor() as pool:
        for kernels in pool.map(lambda cubin: sass.analyze(cubin, architecture), cubins):
            results |= {kernel: {architecture: figures} for kernel, figures in kernels.items()}
    assert not sass.problems(results)


def test_baseline_is_of_every_architecture():
    _, baseline = sass.read_baseline()
    assert GEMM in baseline
    newer = set(sass.ARCHITECTURES) - {75}
    for kernel, by_architecture in baseline.items():
        expected = newer | {75}
        if kernel.startswith("tensor_core_gemm<"):
            # 7.5 has tensor cores for float16 alone, and no asynchronous copies.
            expected = {75} if re.search("__half.*, registers,", kernel) else newer
            if kernel.startswith("tensor_core_gemm<__half") and ", gather," in kernel:
                expected = newer | {75}
        assert by_architecture.keys() == expected, kernel


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spilled_bytes": 8}, "spilled"),
        ({"local_accesses": 1}, "spilled"),
        ({"loop": 620}, "85%"),
        ({"memory": {"LDG.128": 1, "LDG.32": 4}}, "LDG.32"),
        ({"memory": {"LDS.64": 1}}, "LDS.64"),
    ],
)
def test_rules(change, word):
    assert not sass.broken_rules(GEMM, FIGURES)
    assert word in " ".join(sass.broken_rules(GEMM, FIGURES | change))


def test_share_of_multiplications_in_either_layout():
    baseline = sass.read_baseline()[1]
    kernels = [name for name in baseline if ", SimtTile<128, 128>, 4>" in name]
    assert len(kernels) == 6
    for kernel in kernels:
        assert baseline[kernel].keys() == set(sass.ARCHITECTURES)
        assert min(map(sass.share, baseline[kernel].values())) >= 0.85, kernel
        assert "85%" in " ".join(sass.broken_rules(kernel, FIGURES | {"loop": 620}))


@pytest.mark.parametrize(
    ("memory", "word"),
    [
        ({"LDSM.M88.4": 4}, "asynchronous"),
        ({"LDGSTS.128": 2}, "ldmatrix"),
        ({"LDSM.M88.4": 4, "LDGSTS.128": 2, "LD.32": 1}, "generic"),
        ({"LDSM.M88.4": 4, "LDGSTS.128": 2, "LDS.32": 1}, "LDS.32"),
    ],
)
def test_rules_of_tensor_cores(memory, word):
    kernel = "tensor_core_gemm<__half, fprop, async, Tile<128, 128, 2> >"
    sound = FIGURES | {"memory": {"LDSM.M88.4": 4, "LDGSTS.128": 2}}
    assert not sass.broken_rules(kernel, sound)
    assert word in " ".join(sass.broken_rules(kernel, sound | {"memory": memory}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"blocks": 1}, "blocks"),
        ({"loop": 600}, "multiply"),
        ({"memory": FIGURES["memory"] | {"STS.32": 5}}, "STS.32"),
        ({"memory": FIGURES["memory"] | {"LDG.32": 1}}, "LDG.32"),
    ],
)
def test_regressions(change, word):
    assert not sass.regressions(FIGURES, FIGURES)
    assert word in " ".join(sass.regressions(FIGURES | change, FIGURES))


def test_improvements_are_none():
    better = {"blocks": 3, "loop": 560, "memory": {"LDG.128": 2, "LDS.128": 32}}
    assert not sass.regressions(FIGURES | better, FIGURES)


def test_hot_loop_is_the_innermost_that_multiplies():
    code = ["MOV", "LDG", "FFMA", "FFMA", "BRA 0x20", "FFMA", "BRA 0x10", "EXIT", "BRA 0x80"]
    instructions = [(16 * i, *[*text.split(), ""][:2]) for i, text in enumerate(code)]
    assert [opcode for _, opcode, _ in sass.hot_loop(instructions)] == ["FFMA", "FFMA", "BRA"]


def test_occupancy_is_that_of_cudas_calculator():
    # sm, threads, registers, shared bytes, blocks
    assert sass.occupancy(80, 256, 128, 16896) == 2
    assert sass.occupancy(75, 64, 168, 8704) == 6
    assert sass.occupancy(90, 1024, 32, 0) == 2
    assert sass.occupancy(86, 128, 32, 48 << 10) == 2
    assert sass.occupancy(80, 32, 16, 0) == 32
