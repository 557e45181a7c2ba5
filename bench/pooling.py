"""Max-pooling beside TensorFlow and torch, in turns in one run: forward and backward.

    python bench/pooling.py [--threads 2] [--seconds 0.5]

All libraries write outputs of their own making; glibc is told to keep freed memory (mallopt), so
that nobody pays for fresh pages. TensorFlow's gradient is timed as its plain op and, with oneDNN's
rewrite of the graph, by the difference between graphs of several operations and of one; so is ours
inside TensorFlow, whose ratios those of graphs are. torch gets channels_last tensors; it is left out where it is not installed. The last line of each shape
tells the bandwidth of ours and of a copy of the same size.
"""

import ctypes
import statistics
import time

import click
import numpy as np

from fastconv.bench.adapters import dense, empty

SHAPES = [  # x, window, stride, padding
    ((32, 26, 26, 32), 2, 2, 0),
    ((32, 11, 11, 64), 2, 2, 0),
    ((16, 112, 112, 64), 3, 2, 1),
    ((16, 112, 112, 64), 2, 2, 0),
]
OPERATIONS = 9  # of a graph of several


def keep_freed_memory():
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)


def draw(rng, shape):
    return dense(rng.standard_normal(shape).astype(np.float32))


def of_fastconv(x, dy, window, stride, padding):
    import fastconv

    sides = ((padding, padding), (padding, padding))
    options = {"strides": stride, "padding": sides if padding else "valid"}
    _, argmax = fastconv.max_pool2d(x, window, return_argmax=True, **options)
    return {
        "forward": lambda: fastconv.max_pool2d(x, window, **options),
        "backward": lambda: fastconv.max_pool2d_grad(dy, argmax, x.shape, window, **options),
    }


def of_tensorflow(x, dy, window, stride, padding):
    import tensorflow as tf

    sides = [[0, 0], [padding] * 2, [padding] * 2, [0, 0]] if padding else "VALID"
    x, dy = tf.constant(x), tf.constant(dy)

    def forward(x):
        return tf.nn.max_pool2d(x, window, stride, sides)

    y = forward(x)
    options = {"ksize": [1, window, window, 1], "strides": [1, stride, stride, 1]}
    if padding:
        options |= {"padding": "EXPLICIT", "explicit_paddings": np.ravel(sides).tolist()}
    else:
        options["padding"] = "VALID"

    def plain():
        return tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=dy, **options)

    return {"backward, plain op": plain, **in_graphs(forward, x, dy)}


def in_graphs(forward, x, dy, forward_in_training=None):
    """Graphs of one operation and of several, forward and backward."""
    import tensorflow as tf

    def some_values(results):
        # As many of several as of one, so that none is left out and none is kept.
        return [results[i % len(results)][0, 0, 0, i] for i in range(OPERATIONS)]

    def forwards(xs):
        return some_values([forward(x) for x in xs])

    def gradients(x, dys):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = (forward_in_training or forward)(x)
        return some_values([tape.gradient(y, x, dy) for dy in dys])

    def compiled(function):
        return tf.function(function, autograph=False)

    forwards, gradients = compiled(forwards), compiled(gradients)
    xs, dys = ([array * (1 + i) for i in range(OPERATIONS)] for array in (x, dy))
    return {
        "forward, one": lambda: forwards(xs[:1]),
        "forward, several": lambda: forwards(xs),
        "backward, one": lambda: gradients(x, dys[:1]),
        "backward, several": lambda: gradients(x, dys),
    }


def of_fastconv_in_tensorflow(x, dy, window, stride, padding):
    import tensorflow as tf

    from fastconv.adapters import tensorflow as ops

    sides = ((padding, padding), (padding, padding)) if padding else "valid"

    def forward(x, **options):
        return ops.max_pool2d(x, window, strides=stride, padding=sides, **options)

    def in_training(x):
        return forward(x, keep_argmax=True)

    return in_graphs(forward, tf.constant(x), tf.constant(dy), in_training)


def of_torch(x, dy, window, stride, padding):
    import torch

    x, dy = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, dy))
    arguments = ([window] * 2, [stride] * 2, [padding] * 2, [1, 1], False)
    _, indices = torch.ops.aten.max_pool2d_with_indices(x, *arguments)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    return {
        "forward": lambda: torch.nn.functional.max_pool2d(x, *arguments),
        "backward": lambda: backward(dy, x, *arguments, indices),
    }


def set_threads(threads):
    """Returns the makers of functions, of the libraries that are there."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    import fastconv

    fastconv.set_num_threads(threads)
    makers = {
        "fastconv": of_fastconv,
        "fastconv in TensorFlow": of_fastconv_in_tensorflow,
        "TensorFlow": of_tensorflow,
    }
    try:
        import torch
    except ModuleNotFoundError:
        print("torch is not installed")
    else:
        torch.set_num_threads(threads)
        makers["torch"] = of_torch
    return makers


def medians(functions, seconds, rounds=7):
    """The median time of each, in microseconds; they take turns of some milliseconds.

    Not of single calls: the threads of one library still spin when the next one begins.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(3):
                function()
            time.sleep(0.002)
            function()
            end = time.perf_counter() + seconds / rounds
            turn = []
            while time.perf_counter() < end or len(turn) < 3:
                start = time.perf_counter()
                function()
                turn.append(time.perf_counter() - start)
            times[name].append(statistics.median(turn))
    return {name: statistics.median(turns) * 1e6 for name, turns in times.items()}


def first_block(batch):
    """The first block of the MNIST network, as two operations and as one, without allocations."""
    import fastconv

    rng = np.random.default_rng(0)
    x = draw(rng, (batch, 28, 28, 1))
    w = draw(rng, (3, 3, 1, 32))
    bias = draw(rng, 32)
    options = {"activation": "relu"}
    y = fastconv.conv2d(x, w, bias, **options)
    pooled, argmax = fastconv.max_pool2d(y, 2, return_argmax=True)
    dy = draw(rng, pooled.shape)
    dz, dw = empty(y.shape), empty(w.shape)

    def forward(**argmax):
        fastconv.conv2d(x, w, bias, out=y, **options)
        fastconv.max_pool2d(y, 2, out=pooled, **argmax)

    def forward_in_one(**argmax):
        fastconv.conv2d_max_pool2d(x, w, bias, out=pooled, **options, **argmax)

    def backward():
        fastconv.max_pool2d_grad(dy, argmax, y.shape, 2, out=dz)
        fastconv.conv2d_grad_filter(
            x, dz, w.shape, output=y, return_bias_grad=True, out=dw, **options
        )

    def backward_in_one():
        fastconv.conv2d_max_pool2d_grad(x, w, dy, pooled, argmax, with_input_grad=False, **options)

    return {
        "inference": (forward, forward_in_one),
        "training, forward": (
            lambda: forward(return_argmax=True),
            lambda: forward_in_one(return_argmax=True),
        ),
        "training, backward": (backward, backward_in_one),
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="for each function")
def main(threads, seconds):
    keep_freed_memory()
    makers = set_threads(threads)
    rng = np.random.default_rng(0)
    for shape, window, stride, padding in SHAPES:
        x = draw(rng, shape)
        out = [(extent + 2 * padding - window) // stride + 1 for extent in shape[1:3]]
        dy = draw(rng, (shape[0], *out, shape[3]))
        copied = empty(x.shape)
        functions = {"copy": lambda x=x, copied=copied: np.copyto(copied, x)}
        for library, make in makers.items():
            made = make(x, dy, window, stride, padding)
            functions |= {f"{library}: {name}": function for name, function in made.items()}
        found = medians(functions, seconds)
        for library in ("fastconv in TensorFlow", "TensorFlow"):
            for direction in ("forward", "backward"):
                one = found.pop(f"{library}: {direction}, one")
                several = found.pop(f"{library}: {direction}, several")
                found[f"{library}: {direction}, in a graph"] = (several - one) / (OPERATIONS - 1)
        print(f"{shape}, {window} x {window}, stride {stride}, {threads} threads: microseconds")
        for name, microseconds in found.items():
            direction = "backward" if "backward" in name else "forward"
            graph = name.endswith("in a graph")
            ours = f"fastconv{' in TensorFlow' * graph}: {direction}{', in a graph' * graph}"
            ratio = microseconds / found[ours]
            print(f"  {name:34s}{microseconds:10.0f}" + (f"{ratio:8.2f}" if ":" in name else ""))
        moved = x.nbytes + dy.nbytes
        rates = [
            size / found[name] / 1e3
            for size, name in (
                (moved, "fastconv: forward"),
                (moved + dy.size, "fastconv: backward"),
                (2 * x.nbytes, "copy"),
            )
        ]
        print("  GB/s: forward {:.1f}, backward {:.1f}, copy (one thread) {:.1f}".format(*rates))
    for batch in (32, 256):
        print(f"first block, batch {batch}, {threads} threads: two operations / one, microseconds")
        for name, (two, one) in first_block(batch).items():
            found = medians({"two": two, "one": one}, seconds)
            ratio = found["two"] / found["one"]
            print(f"  {name:20s}{found['two']:8.0f} /{found['one']:6.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
