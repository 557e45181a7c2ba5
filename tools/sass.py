#!/usr/bin/env python3
"""What the compiler made of each CUDA kernel, read from its machine code.

Compiles every csrc/cuda/*.cu and tells, for each kernel and architecture: registers, spilled bytes,
shared memory, the blocks a multiprocessor holds (dynamic shared memory left out: it is the
launch's), and the instructions of the hot loop. Then what breaks a rule or is worse than in
tests/sass_baseline.json, and ends in an error where something is. ``--update`` writes that file.

Needs nvcc, and cuobjdump and nvdisasm (CUDA's, or of PyPI's nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm).
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile

import click

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASELINE = ROOT / "tests" / "sass_baseline.json"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_bytes: int
    threads: int
    blocks: int
    registers: int = 65536
    # Of each block's shared memory, for the system. From 9.0 on the compiler counts it itself.
    reserved_bytes: int = 0


MULTIPROCESSORS = {
    75: Multiprocessor(64 << 10, 1024, 16),
    80: Multiprocessor(164 << 10, 2048, 32, reserved_bytes=1024),
    86: Multiprocessor(100 << 10, 1536, 16, reserved_bytes=1024),
    89: Multiprocessor(100 << 10, 1536, 24, reserved_bytes=1024),
    90: Multiprocessor(228 << 10, 2048, 32),
    100: Multiprocessor(228 << 10, 2048, 32),
    120: Multiprocessor(100 << 10, 1536, 24),
}

MULTIPLY = ("FFMA", "HMMA")


class MissingTool(Exception):
    """No compiler or disassembler on this machine."""


@functools.cache
def find_tool(name):
    """The path of one of CUDA's programs: on PATH, in /usr/local/cuda or of PyPI's packages."""
    places = [pathlib.Path("/usr/local/cuda/bin")]
    for site in {sysconfig.get_path("platlib"), sysconfig.get_path("purelib")}:
        places += sorted(pathlib.Path(site, "nvidia").glob("*/bin"))
    found = shutil.which(name) or next(
        (str(place / name) for place in places if os.access(place / name, os.X_OK)), None
    )
    if found is None:
        raise MissingTool(f"{name} is neither on PATH nor in /usr/local/cuda/bin nor from PyPI")
    return found


def sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_cubin(source, architecture, folder):
    cubin = pathlib.Path(folder) / f"{source.stem}.{architecture}.cubin"
    command = [find_tool("nvcc"), "-std=c++20", "-O3", "-I", str(ROOT / "csrc")]
    command += [f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), str(source)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return cubin


def _output(*command):
    environment = dict(os.environ)
    # cuobjdump looks for nvdisasm on PATH.
    folders = {os.path.dirname(find_tool(name)) for name in ("cuobjdump", "nvdisasm")}
    environment["PATH"] = os.pathsep.join([*sorted(folders), environment.get("PATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)


def hot_loop(instructions):
    """The instructions of the innermost loop with the most multiplications, else the longest one.

    A loop is what lies between a backward branch and its target. Without any, the whole kernel.
    """
    index = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = set()
    for i, (_, opcode, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        start = index.get(int(target.group(1), 16)) if target else None
        if start is not None and start < i:  # a branch to itself ends each kernel
            loops.add((start, i))
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]

    def weight(loop):
        body = instructions[loop[0] : loop[1] + 1]
        return sum(opcode.startswith(MULTIPLY) for _, opcode, _ in body), len(body)

    start, end = max(innermost, key=weight, default=(0, len(instructions) - 1))
    return instructions[start : end + 1]


def _launch_bounds(cubin):
    """The threads of a block by kernel, from the attributes in the file's .nv.info sections."""
    data = cubin.read_bytes()
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    string_table = headers[names][4]
    threads = {}
    for header in headers:
        start = string_table + header[0]
        section = data[start : data.index(b"\0", start)].decode()
        if not section.startswith(".nv.info."):
            continue
        at, end = header[4], header[4] + header[5]
        while at < end:
            form, attribute, value = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == 4:  # the value is the size of what follows
                if attribute == 0x05:  # EIATTR_MAX_THREADS
                    extent = struct.unpack_from("<III", data, at)
                    threads[section.removeprefix(".nv.info.")] = extent[0] * extent[1] * extent[2]
                at += value
    return threads


def _short_name(mangled, demangled):
    """simt_gemm_kernel<float, fprop, nhwc, SimtTile<128, 128>, 4>"""
    name = demangled.get(mangled, mangled)
    name = re.sub(r"^void |fastconv::|cuda::|tensor_core::|\(anonymous namespace\)::", "", name)
    name = re.sub(r"\((int|bool|unsigned int)\)(?=[-\d])", "", name)
    for enum, values in (
        ("Direction", ("fprop", "dgrad", "wgrad")),
        ("Layout", ("nhwc", "nchw")),
        ("Copies", ("async", "registers", "gather")),
    ):
        for i, value in enumerate(values):
            name = re.sub(rf"\(?{enum}\)?{i}\b", value, name)
    depth = 0
    for i, character in enumerate(name):  # without the parameters
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def occupancy(architecture, threads, registers, shared_bytes):
    """Blocks a multiprocessor holds: CUDA's occupancy calculator."""
    multiprocessor = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    # Registers go to a warp in portions of 256, warps to the four parts of a multiprocessor.
    warps_by_registers = 4 * (multiprocessor.registers // 4 // (-(-registers * 32 // 256) * 256))
    limits = [
        multiprocessor.blocks,
        multiprocessor.threads // 32 // warps,
        warps_by_registers // warps,
    ]
    shared = -(-(shared_bytes + multiprocessor.reserved_bytes) // 128) * 128
    if shared:
        limits.append(multiprocessor.shared_bytes // shared)
    return min(limits)


def analyze(cubin, architecture):
    """{kernel: figures} of a cubin."""
    cuobjdump = find_tool("cuobjdump")
    usage = {}
    for function, figures in re.findall(
        r"Function (\S+):\s*\n\s*(.*)", _output(cuobjdump, "-res-usage", str(cubin))
    ):
        usage[function] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", figures)}
    demangled = dict(
        zip(
            usage,
            subprocess.run(
                [shutil.which("c++filt") or "cat"],
                input="\n".join(usage),
                capture_output=True,
                text=True,
                check=True,
            ).stdout.splitlines(),
            strict=True,
        )
    )
    bounds = _launch_bounds(cubin)
    kernels = {}
    for part in _output(cuobjdump, "-sass", str(cubin)).split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        if mangled not in usage:
            continue
        instructions = [
            (int(match["address"], 16), match["opcode"], match["operands"])
            for match in _INSTRUCTION.finditer(part)
        ]
        everywhere = collections.Counter(opcode.split(".")[0] for _, opcode, _ in instructions)
        if not any(opcode.startswith("ST") for opcode in everywhere):
            continue  # not for this architecture: its body is empty there
        loop = hot_loop(instructions)
        mix = collections.Counter(opcode.split(".")[0] for _, opcode, _ in loop)
        memory = collections.Counter(
            _memory_access(opcode)
            for _, opcode, operands in loop
            if opcode.startswith(("LD", "ST", "ATOM", "RED"))
            and opcode != "LDGDEPBAR"
            # It loads nothing: ptxas orders asynchronous copies with it.
            and (opcode, operands.strip()) != ("LDS", "RZ, [RZ]")
        )
        used = usage[mangled]
        threads = bounds.get(mangled, 1024)
        blocks = occupancy(architecture, threads, used["REG"], used["SHARED"])
        kernels[_short_name(mangled, demangled)] = {
            "registers": used["REG"],
            # Local memory is where spilled registers and indexed arrays lie.
            "spilled_bytes": used["STACK"] + used["LOCAL"],
            "local_accesses": everywhere["LDL"] + everywhere["STL"],
            "shared_bytes": used["SHARED"],
            "threads": threads,
            "blocks": blocks,
            "warps": blocks * -(-threads // 32),
            "loop": len(loop),
            "multiply": sum(mix[opcode] for opcode in MULTIPLY),
            "memory": dict(sorted(memory.items())),
        }
    return kernels


def _memory_access(opcode):
    """LDS.128 of LDS.U.128, LDG.32 of LDG.E.CONSTANT: the operation and its bits."""
    parts = opcode.split(".")
    width = next((part for part in parts if part in ("64", "128", "U8", "S8", "U16", "S16")), "32")
    if parts[0] == "LDSM":
        width = next((part for part in parts if part.startswith("M")), "") + "." + parts[-1]
    return f"{parts[0]}.{width}"


def nvcc_release():
    """Such as "13.0"."""
    return re.search(r"release ([\d.]+)", _output(find_tool("nvcc"), "--version")).group(1)


def measure(architectures, chosen_sources=None, jobs=None):
    """{kernel: {architecture: figures}}"""
    for name in ("nvcc", "cuobjdump", "nvdisasm"):
        find_tool(name)
    # The longest first, so that the last one does not run alone.
    by_size = sorted(chosen_sources or sources(), key=lambda source: -source.stat().st_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool,
    ):
        futures = [
            (a, pool.submit(lambda s, a: analyze(compile_cubin(s, a, folder), a), source, a))
            for source in by_size
            for a in architectures
        ]
        results = {}
        for architecture, future in futures:
            for kernel, figures in future.result().items():
                results.setdefault(kernel, {})[architecture] = figures
    return results


def share(figures):
    """Of multiplications among the instructions of the hot loop."""
    return figures["multiply"] / figures["loop"]


def broken_rules(kernel, figures):
    """What must hold of every kernel by any compiler, in words where it does not."""
    broken = []
    if figures["spilled_bytes"] or figures["local_accesses"]:
        broken.append(
            f"{figures['spilled_bytes']} bytes and {figures['local_accesses']} instructions of "
            "local memory; nothing may be spilled"
        )
    memory = figures["memory"]
    main_loop = re.match(r"simt_gemm_kernel<float, \w+, (\w+), SimtTile<128, 128>, 4>", kernel)
    if main_loop and share(figures) < 0.85:
        broken.append(f"{share(figures):.1%} of the main loop multiply; 85% must")
    # In NCHW neighbouring threads read neighbouring pixels, and descriptions of what they read.
    if main_loop and main_loop[1] == "nhwc":
        broken += [
            f"{access} in the main loop; reads must be of 128 bits"
            for access in memory
            if access.startswith(("LDG.", "LDS.")) and access not in ("LDG.128", "LDS.128")
        ]
    if kernel.startswith("tensor_core_gemm<"):
        if not figures["multiply"]:
            broken.append("no multiplication on tensor cores in the main loop")
        if not any(access.startswith("LDSM.") for access in memory):
            broken.append("operands do not come by ldmatrix")
        broken += [
            f"{access} in the main loop; operands must come by ldmatrix alone"
            for access in memory
            if access.startswith("LDS.")
        ]
        if any(access.startswith("LD.") for access in memory):
            broken.append("generic loads in the main loop")
        if " async," in kernel and not any(access.startswith("LDGSTS.") for access in memory):
            broken.append("no asynchronous copies in the main loop")
    return broken


def regressions(figures, baseline):
    """What is worse than in the baseline, in words. Half a percent of a loop is no matter."""
    worse = []
    if figures["blocks"] < baseline["blocks"]:
        worse.append(
            f"{figures['blocks']} blocks a multiprocessor ({figures['registers']} registers), "
            f"not {baseline['blocks']} ({baseline['registers']})"
        )
    if share(figures) < share(baseline) - 0.005:
        worse.append(
            f"{share(figures):.1%} of a loop of {figures['loop']} multiply, not "
            f"{share(baseline):.1%} of {baseline['loop']}"
        )
    if not baseline["multiply"] and figures["loop"] > baseline["loop"] * 1.005:
        worse.append(f"a loop of {figures['loop']} instructions, not {baseline['loop']}")
    for access, count in figures["memory"].items():
        if count > baseline["memory"].get(access, 0) and not access.endswith(".128"):
            worse.append(f"{count} {access} in the loop, not {baseline['memory'].get(access, 0)}")
    return worse


# In the baseline figures are a list: of these, and of memory accesses as "LDG.128:2 LDS.128:33".
FIGURES = ("registers", "shared_bytes", "threads", "blocks", "loop", "multiply")


def read_baseline():
    """(nvcc's release, {kernel: {architecture: figures}})"""
    content = json.loads(BASELINE.read_text())
    kernels = {}
    for kernel, by_architectures in content["kernels"].items():
        for architectures, values in by_architectures.items():
            figures = dict(zip(FIGURES, values, strict=False))
            figures["memory"] = {
                access: int(count)
                for access, count in (item.split(":") for item in values[-1].split())
            }
            for architecture in map(int, architectures.split()):
                kernels.setdefault(kernel, {})[architecture] = figures
    return content["nvcc"], kernels


def write_baseline(results):
    """A line for each kernel and all architectures with the same figures: told apart by diff."""
    kernels = []
    for kernel, by_architecture in sorted(results.items()):
        grouped = {}
        for architecture, figures in sorted(by_architecture.items()):
            values = [figures[name] for name in FIGURES]
            values.append(" ".join(f"{key}:{count}" for key, count in figures["memory"].items()))
            grouped.setdefault(json.dumps(values), []).append(str(architecture))
        lines = [f'      "{" ".join(keys)}": {values}' for values, keys in grouped.items()]
        kernels.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n    }")
    BASELINE.write_text(
        f'{{\n  "nvcc": "{nvcc_release()}",\n  "kernels": {{\n' + ",\n".join(kernels) + "\n  }\n}\n"
    )


def problems(results, *, whole=True):
    """What breaks a rule or is worse than in the baseline, a line each.

    Another nvcc allots registers and orders loops its own way: against its code the rules stand
    alone. ``whole``: results are of all sources, so that every kernel of the baseline is there.
    """
    release, baseline = read_baseline()
    comparable = release == nvcc_release()
    found = []
    for kernel, by_architecture in results.items():
        for architecture, figures in by_architecture.items():
            words = broken_rules(kernel, figures)
            expected = baseline.get(kernel, {}).get(architecture)
            if expected is None:
                words.append("not in the baseline; tools/sass.py --update adds it")
            elif comparable:
                words += regressions(figures, expected)
            found += [f"sm_{architecture} {kernel}: {word}" for word in words]
    if whole:
        architectures = {a for by_architecture in results.values() for a in by_architecture}
        found += [
            f"sm_{architecture} {kernel}: in the baseline and nowhere else"
            for kernel, by_architecture in baseline.items()
            for architecture in sorted(architectures & by_architecture.keys())
            if architecture not in results.get(kernel, {})
        ]
    return found


@click.command(help=__doc__)
@click.option("--arch", "architectures", type=int, multiple=True, default=ARCHITECTURES)
@click.option("--source", "names", multiple=True, help="One of csrc/cuda, such as simt_gemm.cu.")
@click.option("--update", is_flag=True, help="Write what was measured to the baseline.")
@click.option("--jobs", type=int, help="Compilers at a time.")
def main(architectures, names, update, jobs):
    chosen = [source for source in sources() if not names or source.name in names]
    try:
        results = measure(architectures, chosen, jobs)
    except MissingTool as error:
        raise click.ClickException(str(error)) from None
    for kernel, by_architecture in sorted(results.items()):
        for architecture, figures in sorted(by_architecture.items()):
            memory = " ".join(f"{key}:{count}" for key, count in figures["memory"].items())
            click.echo(
                f"sm_{architecture} {kernel}: {figures['registers']} registers, "
                f"{figures['spilled_bytes']} bytes spilled, {figures['shared_bytes']} shared, "
                f"{figures['blocks']} blocks of {figures['threads']}; loop of "
                f"{figures['loop']}, {share(figures):.1%} multiply; {memory}"
            )
    if update:
        merged = {kernel: dict(by_architecture) for kernel, by_architecture in results.items()}
        for kernel, by_architecture in (read_baseline()[1] if BASELINE.exists() else {}).items():
            # Of all sources: what was not measured is no more.
            measured = () if names else architectures
            for architecture, figures in by_architecture.items():
                if architecture not in measured:
                    merged.setdefault(kernel, {}).setdefault(architecture, figures)
        write_baseline(merged)
    found = problems(results, whole=not names)
    if found:
        raise click.ClickException("\n".join(["worse than it should be:", *found]))


if __name__ == "__main__":
    main()
