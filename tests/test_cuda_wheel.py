"""The package with its real CUDA module, by nvcc, on a machine without a GPU or driver."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cuda_builds
import fastconv

sys.path.insert(0, str(cuda_builds.ROOT / "tools"))
import sass

SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
import json, numpy as np, fastconv, fastconv.cuda
facts = fastconv.info()["cuda"]
x, w = np.ones((1, 6, 6, 8), np.float32), np.ones((3, 3, 8, 4), np.float32)
y = fastconv.conv2d(x, w)
assert (y == 72).all() and (fastconv.max_pool2d(y, 2) == 72).all()
assert fastconv.conv2d_grad_input(y, w, x.shape).shape == x.shape
assert fastconv.conv2d_grad_filter(x, y, w.shape).shape == w.shape

class OnDevice:
    __cuda_array_interface__ = {
        "shape": x.shape, "typestr": "<f4", "data": (4096, False), "version": 3, "stream": None,
    }

errors = []
for call in (
    lambda: fastconv.conv2d(OnDevice(), OnDevice()),
    lambda: fastconv.cuda.array(x),
    lambda: fastconv.cuda.explain(x.shape, w.shape),
    lambda: fastconv.cuda.Stream(),
):
    try:
        call()
    except fastconv.cuda.CudaError as error:
        errors.append(str(error))
print(json.dumps([facts, errors]))
"""


def nvcc():
    try:
        return sass.find_tool("nvcc")
    except sass.MissingTool as error:
        pytest.skip(str(error))


def run(*command, **environment):
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def assert_on_the_cpu(python, folder, *paths):
    """``python`` imports a package from ``folder`` whose module opens, and finds no GPU."""
    output = run(python, "-c", SCRIPT, *paths, FASTCONV_CUDA_LIBRARY="")
    facts, errors = json.loads(output)
    assert Path(facts["library"] or "none").is_relative_to(folder)
    assert facts["runtime"]
    if facts["available"]:
        pytest.skip("this machine has a GPU")
    assert not facts["devices"]
    assert facts["reason"]
    assert errors == [f"There is no GPU to compute on: {facts['reason']}"] * 4


def test_module_beside_the_package(tmp_path):
    """What a wheel with CUDA kernels installs, of one architecture."""
    module, _ = cuda_builds.build_by_nvcc(nvcc(), 80)
    needed = run("readelf", "--dynamic", module)
    assert "(NEEDED)" in needed
    assert "libcuda" not in needed  # cudart is inside, and opens the driver when first called
    shutil.copytree(Path(fastconv.__file__).parent, tmp_path / "fastconv")
    shutil.copy(module, tmp_path / "fastconv")
    assert_on_the_cpu(sys.executable, tmp_path, tmp_path)


# A minute or two of the compiler each, for one architecture.
@pytest.mark.sweep
@pytest.mark.parametrize("compiler", ["ON", "pypi"])
def test_wheel(tmp_path, compiler):
    environment = {
        "FASTCONV_CUDA": compiler,
        "SKBUILD_CMAKE_DEFINE": "CMAKE_CUDA_ARCHITECTURES=80-real",
    }
    if compiler == "ON":
        environment["CUDACXX"] = nvcc()
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path,
        "-C", f"build-dir={tmp_path / 'build'}", cuda_builds.ROOT, **environment,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert "fastconv/libfastconv_cuda.so" in zipfile.ZipFile(wheel).namelist()

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    assert_on_the_cpu(python, tmp_path)
