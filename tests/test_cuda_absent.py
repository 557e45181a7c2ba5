"""Machines without a GPU, a driver or a build with CUDA kernels: everything runs on the CPU."""

import os
import subprocess
import sys

import pytest

import cuda_builds


def run_python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


SAY_WHY = """
import numpy as np, fastconv, fastconv.cuda
facts = fastconv.info()["cuda"]
assert facts["available"] is False and not fastconv.cuda.is_available(), facts
try:
    fastconv.cuda.array(np.zeros(3, np.float32))
except fastconv.cuda.CudaError as error:
    assert facts["reason"] in str(error), error
x = np.ones((1, 3, 3, 1), np.float32)
assert fastconv.conv2d(x, x.reshape(3, 3, 1, 1)) == 9
print(facts["reason"])
"""


def compile_module(tmp_path, text):
    """A module like fastconv_cuda, by the compiler alone."""
    (tmp_path / "module.cpp").write_text(text)
    path = tmp_path / "module.so"
    command = [*cuda_builds.compiler(), "-std=c++20", "-shared", "-fPIC"]
    command += [f"-I{cuda_builds.ROOT / 'csrc'}", "-o", str(path)]
    subprocess.run([*command, str(tmp_path / "module.cpp")], check=True)
    return str(path)


TABLE = """
#include "cuda/library.hpp"
using namespace fastconv::cuda;
static Library table;
extern "C" const Library* fastconv_cuda_library() {
  table.message = [] { return "CUDA error while counting devices: cudaErrorInsufficientDriver"; };
  table.versions = [](int* runtime, int* driver) { *runtime = 13000; *driver = 0;
                                                   return Status::success; };
  table.device_count = [](int* count) { *count = 0; return STATUS; };
  CHANGE
  return &table;
}
"""


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (TABLE.replace("STATUS", "Status::cuda_error"), "cudaErrorInsufficientDriver"),
        (TABLE.replace("STATUS", "Status::success"), "there is no CUDA device"),
        (TABLE.replace("CHANGE", "table.version = 0;"), "belongs to another version of fastconv"),
        (TABLE.replace("CHANGE", "table.bytes -= 8;"), "belongs to another version of fastconv"),
        ("", "belongs to another version of fastconv"),
    ],
    ids=["no driver", "no device", "version", "size", "no symbol"],
)
def test_whatever_fails_means_the_cpu(tmp_path, table, reason):
    table = table.replace("CHANGE", "").replace("STATUS", "Status::success")
    run = run_python(SAY_WHY, FASTCONV_CUDA_LIBRARY=compile_module(tmp_path, table))
    assert run.returncode == 0, run.stderr
    assert reason in run.stdout


def test_no_module(tmp_path):
    run = run_python(SAY_WHY, FASTCONV_CUDA_LIBRARY=str(tmp_path / "none.so"))
    assert run.returncode == 0, run.stderr
    assert "there is no file" in run.stdout
    (tmp_path / "text.so").write_text("no library")
    run = run_python(SAY_WHY, FASTCONV_CUDA_LIBRARY=str(tmp_path / "text.so"))
    assert run.returncode == 0, run.stderr


def test_this_build():
    """The tests are of a build without CUDA kernels, or on a machine that may have a GPU."""
    run = run_python("import fastconv; print(fastconv.info()['cuda'])", FASTCONV_CUDA_LIBRARY="")
    assert run.returncode == 0, run.stderr
    assert "'available': True" in run.stdout or "'reason': '" in run.stdout
    assert "there is no file" not in run.stdout  # a variable set to nothing names none


FORK_MEANWHILE = """
import os, signal, sys, threading, time
import fastconv
waiting, answers = sys.argv[1:]
os.environ["FASTCONV_CUDA_LIBRARY"] = waiting  # whoever opens it waits for somebody to write
thread = threading.Thread(target=fastconv.cuda.is_available, daemon=True)
thread.start()
time.sleep(0.5)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os.environ["FASTCONV_CUDA_LIBRARY"] = answers
    assert fastconv.info()["cuda"]["reason"].startswith("there is no file")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
# Open for both, it lets nobody wait; what is read of it is no library.
os.write(os.open(waiting, os.O_RDWR | os.O_NONBLOCK), bytes(2048))
thread.join()
assert not fastconv.cuda.is_available()
"""


def test_a_process_forked_while_the_module_is_opened(tmp_path):
    """Opening takes seconds where a driver starts: the child does not wait for a thread it has not."""
    waiting = tmp_path / "waiting.so"
    os.mkfifo(waiting)
    command = [sys.executable, "-W", "ignore", "-c", FORK_MEANWHILE, waiting, tmp_path / "none.so"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
