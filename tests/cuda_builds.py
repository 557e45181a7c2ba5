"""The CUDA sources compiled by the C++ compiler against the emulator, in three builds:

``fast``   the kernels as they are, for the tests of what they compute;
``asan``   under AddressSanitizer and UndefinedBehaviorSanitizer, whose first finding ends the
           process: it must have been started with libasan preloaded (``asan_environment``);
``check``  instrumented as for ThreadSanitizer, whose place the emulator takes: races,
           uninitialised shared memory, out of bounds, misaligned vectors.

And by nvcc, where there is one: the real module, for one architecture.

What has been compiled lies in build/emulator and build/nvcc and is kept as long as what it was made
from is the same: an unchanged tree compiles nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
BUILDS = ("fast", "asan", "check")

_COMMON = [
    "-std=c++20",
    "-fPIC",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-DFASTCONV_CUDA_EMULATE",
]
_SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    # Without what AddressSanitizer finds as well, and with its checks as calls, the compiler is through sooner.
    "-fno-sanitize=null,object-size",
    "--param=asan-instrumentation-with-call-threshold=0",
]
# Of the kernels, and of the emulator itself.
_KERNEL_FLAGS = {
    "fast": ["-O2"],
    "asan": ["-O1", *_SANITIZERS],
    "check": ["-O2", "-fsanitize=thread"],
}
_EMULATOR_FLAGS = {
    "fast": ["-O2"],
    "asan": ["-O1", *_SANITIZERS],
    "check": ["-O2", "-DFASTCONV_EMULATOR_CHECK"],
}


def compiler():
    return shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")


def emulator_sources(build):
    sources = sorted((CUDA / "emulator").glob("*.cpp"))
    return [s for s in sources if build == "check" or s.name != "memory_checker.cpp"]


def library_sources():
    """What the module ``fastconv_cuda`` is made of, the emulator left out."""
    return [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp")), ROOT / "csrc/core/problem.cpp"]


def build(name, sources, kind):
    """The path of lib<name>.so made of ``sources`` and the emulator, in one of BUILDS."""
    folder = ROOT / "build" / "emulator" / kind
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict.fromkeys(sources, _KERNEL_FLAGS[kind])
    flags.update(dict.fromkeys(emulator_sources(kind), _EMULATOR_FLAGS[kind]))
    launcher = shlex.split(os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""))
    with _locked(folder), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(
            pool.map(lambda item: _compile(folder, launcher, *item), flags.items()),
        )
        library = folder / f"lib{name}.so"
        _make(
            library,
            [
                *compiler(),
                "-shared",
                "-Wl,-Bsymbolic",
                *(_SANITIZERS if kind == "asan" else ["-Wl,--no-undefined"]),
                *map(str, made),
                "-o",
                str(library),
            ],
            lambda: made,
        )
    return library


def build_by_nvcc(nvcc, architecture):
    """The real module, for one architecture and as CMakeLists.txt makes it, and its cubins.

    Returns the path of libfastconv_cuda.so and the list of paths of the kernels' machine code, which
    is what ``nvcc -O3`` makes of them; only the host's side is not optimised.
    """
    folder = ROOT / "build" / "nvcc" / f"sm_{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O3", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-DFASTCONV_CUDA_{code}={architecture}" for code in ("CODE", "PTX")]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-O0"]
    # PyPI's packages keep the libraries in lib, where nvcc looks for lib64.
    libraries = Path(nvcc).resolve().parent.parent / "lib"
    link = ["-shared", "-cudart", "static", f"-L{libraries}"]
    link += ["-Xlinker=-Bsymbolic", "-Xlinker=--no-undefined"]

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        kept = folder / source.stem
        kept.mkdir(exist_ok=True)
        rules = target.with_suffix(".d")
        command = [nvcc, *flags, "--keep", "--keep-dir", str(kept), "-MD", "-MF", str(rules)]
        command += ["-x", "cu" if source.is_relative_to(CUDA) else "c++"]
        command += ["-c", str(source), "-o", str(target)]
        return _make(target, command, lambda: _prerequisites(rules))

    # The longest first, so that the last one does not run alone.
    sources = sorted(library_sources(), key=lambda source: -source.stat().st_size)
    with _locked(folder), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
        library = folder / "libfastconv_cuda.so"
        _make(library, [nvcc, *link, *map(str, objects), "-o", str(library)], lambda: objects)
    return library, sorted(folder.glob("*/*.cubin"))


def asan_environment():
    """The environment variables of a process that opens an ``asan`` build."""
    # libstdc++ too, which Python does not load at its start: where ASan has not found the function
    # that throws exceptions, the first one ends the process.
    preloaded = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        "LD_PRELOAD": ":".join(preloaded),
        # Python leaks as it likes; and NumPy asks for more memory than there is, to be refused it.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _compile(folder, launcher, source, flags):
    target = folder / (source.relative_to(ROOT / "csrc").as_posix().replace("/", "-") + ".o")
    rules = target.with_suffix(".d")
    command = [*launcher, *compiler(), *_COMMON, *flags, f"-I{ROOT / 'csrc'}"]
    command += ["-MD", "-MF", str(rules), "-x", "c++", "-c", str(source), "-o", str(target)]
    return _make(target, command, lambda: _prerequisites(rules))


def _prerequisites(rules):
    """The files of this tree that the compiler has read, by the makefile rule that it has left."""
    names = rules.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    return sorted({Path(n) for n in names if Path(n).resolve().is_relative_to(ROOT)})


def _make(target, command, prerequisites):
    """``target``, by ``command``, unless it exists and its command and prerequisites are the same."""
    stamp = target.with_suffix(target.suffix + ".stamp")
    with contextlib.suppress(OSError, IndexError):
        if target.exists() and stamp.read_text() == _fingerprint(command, prerequisites()):
            return target
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if run.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{run.stdout}{run.stderr}")
    if run.stderr:
        print(run.stderr, file=sys.stderr)
    stamp.write_text(_fingerprint(command, prerequisites()))
    return target


def _fingerprint(command, files):
    contents = {str(f): hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files}
    return json.dumps([command, contents], indent=1)


@contextlib.contextmanager
def _locked(folder):
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":  # python tests/cuda_builds.py [fast|asan|check]...
    for kind in sys.argv[1:] or BUILDS:
        print(build("fastconv_cuda", library_sources(), kind))
