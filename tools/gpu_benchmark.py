#!/usr/bin/env python3
"""Times fastconv's convolutions on the GPU beside cuDNN's, by PyTorch or CuPy; prints JSON.

Both compute the same layer from the same memory in turn, in one process. Two times are taken: that of
a call, by two events of the stream around several of them, median of the rounds, which for small
layers is that of Python and the launches; and that of the kernels alone, their durations added up,
where PyTorch's profiler tells them. Called by tools/gpu_check.py. Exits with 4 where neither library
is there.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial

import numpy as np

import fastconv
import fastconv.cuda as ours
from fastconv.bench import suites
from fastconv.bench.problem import DIRECTIONS, parse

ROUNDS, CALLS, WARM_UP = 7, 10, 3
REHEARSED = 'mb2ic8ih7iw6oc16kh3kw3ph1pw1n"rehearsed"'
NO_PEER = 4


class Torch:
    """cuDNN by PyTorch, channels last, algorithms tried out beforehand (cudnn.benchmark)."""

    dtypes = ("float32", "tf32", "float16", "bfloat16")

    def __init__(self):
        import torch

        if not (torch.cuda.is_available() and torch.backends.cudnn.is_available()):
            raise ImportError("torch without CUDA or cuDNN")
        self.torch = torch
        self.name = f"cuDNN {torch.backends.cudnn.version()} by torch {torch.__version__}"
        torch.backends.cudnn.benchmark = True

    def prepare(self, dtype):
        self.torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        self.type = getattr(self.torch, "float32" if dtype == "tf32" else dtype)

    def array(self, host):
        return self.torch.from_numpy(host).cuda().to(self.type)

    def host(self, array):
        return self.torch.from_dlpack(array).float().cpu().numpy()

    def convolution(self, problem, direction, x, w, dy):
        """A function that computes it, and one that brings its result into our layout."""
        torch = self.torch
        # N,H,W,C in memory is what torch calls N,C,H,W in channels_last.
        x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
        w = w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        options = [problem.strides, problem.pads, problem.dilations, False, (0, 0), problem.groups]
        if direction == "fprop":
            strides, pads, dilations = problem.strides, problem.pads, problem.dilations
            call = partial(torch.conv2d, x, w, None, strides, pads, dilations, problem.groups)
            return call, lambda y: y.permute(0, 2, 3, 1).contiguous()
        wanted = [direction == "dgrad", direction == "wgrad", False]
        backward = torch.ops.aten.convolution_backward
        call = partial(backward, dy, x, w, None, *options, wanted)
        which = 0 if direction == "dgrad" else 1
        order = (0, 2, 3, 1) if direction == "dgrad" else (2, 3, 1, 0)
        return call, lambda results: results[which].permute(*order).contiguous()

    def kernel_seconds(self, call, calls):
        """Of all kernels, copies and fills of a call, whoever launches them."""
        from torch.profiler import ProfilerActivity, profile

        self.torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            for _ in range(calls):
                call()
            self.torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / calls

    def seconds(self, call, calls):
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


class CuPy:
    """cuDNN by CuPy (below 14, which dropped it): N,C,H,W."""

    dtypes = ("float32", "float16")

    def __init__(self):
        import cupy
        from cupy import cudnn

        self.cupy, self.cudnn = cupy, cudnn
        self.name = f"cuDNN {cupy.cuda.cudnn.getVersion()} by cupy {cupy.__version__}"

    def prepare(self, dtype):
        self.type = dtype

    def array(self, host):
        return self.cupy.asarray(host).astype(self.type)

    def host(self, array):
        return self.cupy.from_dlpack(array).astype("float32").get()

    def convolution(self, problem, direction, x, w, dy):
        cupy = self.cupy
        x, dy = (cupy.ascontiguousarray(a.transpose(0, 3, 1, 2)) for a in (x, dy))
        w = cupy.ascontiguousarray(w.transpose(3, 2, 0, 1))
        out = cupy.empty_like({"fprop": dy, "dgrad": x, "wgrad": w}[direction])
        geometry = (problem.pads, problem.strides, problem.dilations, problem.groups)
        options = {"auto_tune": True, "tensor_core": "auto"}
        if direction == "fprop":
            call = partial(self.cudnn.convolution_forward, x, w, None, out, *geometry, **options)
        elif direction == "dgrad":
            backward = self.cudnn.convolution_backward_data
            options["deterministic"] = False
            call = partial(backward, w, dy, None, out, *geometry, **options)
        else:
            backward = self.cudnn.convolution_backward_filter
            options["deterministic"] = False
            call = partial(backward, x, dy, out, *geometry, **options)
        order = (2, 3, 1, 0) if direction == "wgrad" else (0, 2, 3, 1)
        return call, lambda _: cupy.ascontiguousarray(out.transpose(order))

    def kernel_seconds(self, call, calls):
        return None

    def seconds(self, call, calls):
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls


class Host:
    """fastconv on the CPU in cuDNN's place, by the CPU's clock: a rehearsal without a GPU."""

    dtypes = ("float32", "float16")
    name = "the CPU, in a rehearsal"

    def prepare(self, dtype):
        self.type = dtype

    def array(self, host):
        return ours.array(host, self.type)

    def host(self, array):
        return np.asarray(array.numpy() if hasattr(array, "numpy") else array, np.float32)

    def convolution(self, problem, direction, x, w, dy):
        x, w, dy = (self.host(array) for array in (x, w, dy))
        geometry = geometry_of(problem)
        call = {
            "fprop": partial(fastconv.conv2d, x, w, **geometry),
            "dgrad": partial(fastconv.conv2d_grad_input, dy, w, x.shape, **geometry),
            "wgrad": partial(fastconv.conv2d_grad_filter, x, dy, w.shape, **geometry),
        }[direction]
        return call, lambda result: result

    def kernel_seconds(self, call, calls):
        return None

    def seconds(self, call, calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


def find_peer():
    """The first of the two that works here."""
    reasons = []
    for kind in (Torch, CuPy):
        try:
            return kind()
        except Exception as error:  # noqa: BLE001, PERF203 - whatever a broken installation raises
            reasons.append(f"{kind.__name__}: {error}")
    print("neither PyTorch nor CuPy has cuDNN here. " + "; ".join(reasons), file=sys.stderr)
    raise SystemExit(NO_PEER)


def geometry_of(problem):
    return {
        "strides": problem.strides,
        "padding": problem.sides,
        "dilation_rate": problem.dilations,
        "groups": problem.groups,
    }


def measure(peer, problem, direction, dtype):
    rng = np.random.default_rng(0)
    shapes = (problem.x_shape, problem.w_shape, problem.y_shape)
    peer.prepare(dtype)
    ours.set_float32_math("tf32" if dtype == "tf32" else "ieee")
    theirs = [peer.array(rng.standard_normal(s).astype(np.float32)) for s in shapes]
    x, w, dy = (ours.asarray(array) for array in theirs)
    geometry = geometry_of(problem)
    function, arguments = {
        "fprop": (ours.conv2d, (x, w)),
        "dgrad": (ours.conv2d_grad_input, (dy, w, problem.x_shape)),
        "wgrad": (ours.conv2d_grad_filter, (x, dy, problem.w_shape)),
    }[direction]
    calls = {"fastconv": partial(function, *arguments, **geometry)}
    calls["cuDNN"], in_our_layout = peer.convolution(problem, direction, *theirs)
    found, expected = peer.host(calls["fastconv"]()), peer.host(in_our_layout(calls["cuDNN"]()))
    for call in calls.values():
        peer.seconds(call, WARM_UP)
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(peer.seconds(call, CALLS))
    alone = {name: peer.kernel_seconds(call, CALLS) for name, call in calls.items()}
    stored = "float32" if dtype == "tf32" else dtype
    chosen = ours.explain(
        problem.x_shape, problem.w_shape, direction=direction, dtype=stored, **geometry
    )[0]
    return {
        "problem": str(problem),
        "name": problem.name,
        "direction": direction,
        "dtype": dtype,
        "algorithm": chosen["algorithm"],
        "blocking": chosen["blocking"],
        "predicted_seconds": chosen["predicted_seconds"],
        "flops": problem.flops(),
        "largest_difference": float(abs(found - expected).max() / abs(expected).max()),
        **{f"seconds_{name}": statistics.median(values) for name, values in times.items()},
        **{f"kernel_seconds_{name}": seconds for name, seconds in alone.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="append", help="default: mnist, resnet50 and vgg16")
    parser.add_argument("--dtype", action="append", help="default: all that the peer has")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows, failures = [], []
    if options.rehearse:
        global ROUNDS, CALLS, WARM_UP
        ROUNDS, CALLS, WARM_UP = 1, 1, 1
        peer, layers = Host(), [[parse(REHEARSED)]]
    else:
        peer = find_peer()
        layers = [suites.suite(name) for name in options.suite or ("mnist", "resnet50", "vgg16")]
    for problems in layers:
        for problem in problems:
            for direction in DIRECTIONS[: 0 if problem.is_pool else None]:
                for dtype in options.dtype or peer.dtypes:
                    try:
                        rows.append(measure(peer, problem, direction, dtype))
                    except Exception as error:  # noqa: BLE001, PERF203 - the other layers are worth it
                        text = f"{problem} {direction} {dtype}: {type(error).__name__}: {error}"
                        print(text, file=sys.stderr)
                        failures.append(text)
    json.dump({"peer": peer.name, "rows": rows, "failures": failures}, sys.stdout, indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
