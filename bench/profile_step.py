"""Where the time of a training step and of inference goes, stock and fast, op by op; and peak memory.

    python bench/profile_step.py [--report docs/profile.md] [--rounds 60]

Of the article's MNIST network, of ResNet50 and MobileNetV2 (accelerate()d). TensorFlow's profiler tells
how long each op ran; ops are summed by what they are for. Ops that overlap count in full each, so sums
exceed a step's time, which is measured without the profiler, both sides in turn. XLA is off.
"""

import collections
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

NETWORKS = ("ResNet50", "MobileNetV2")
SIDES = ("stock", "fast")


# --- what is measured -----------------------------------------------------------------------------


def article(side, batch):
    import keras

    from fastconv.keras import FastConv2D, FastMaxPooling2D
    from train_step import build

    layers = {
        "stock": (keras.layers.Conv2D, keras.layers.MaxPooling2D),
        "fast": (FastConv2D, FastMaxPooling2D),
    }[side]
    rng = np.random.default_rng(0)
    images = rng.random((batch, 28, 28, 1), "float32")
    return (
        build(layers, jit=False),
        images,
        np.eye(10, dtype="float32")[rng.integers(10, size=batch)],
    )


def network(name, side, batch):
    import fastconv
    import networks

    model = networks.build(name, 224, jit=False)
    if side == "fast":
        fastconv.accelerate(model)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 224, 224, 3), "float32")
    return model, images, np.eye(10, dtype="float32")[rng.integers(10, size=batch)]


def built(name, side, batch):
    return article(side, batch) if name == "article" else network(name, side, batch)


def training(name, side, batch):
    """A function that takes one training step of data that stays in memory."""
    import train_step

    model, *data = built(name, side, batch)
    return train_step.stepper(model, tuple(data))


def compiled(name, side, batch):
    """A function that infers by a call of the model in a tf.function."""
    import tensorflow as tf

    model, images, _ = built(name, side, batch)
    images = tf.constant(images)
    call = tf.function(lambda x: model(x, training=False))
    return lambda: call(images).numpy()


def predict(name, side, batch):
    model, images, _ = built(name, side, batch)
    return lambda: model.predict_on_batch(images)


def in_turns(make, calls):
    """As interleaved(), in turns of several calls, where a call takes no longer than a thread waits."""
    from train_step import compare, take_turns

    runs = {side: make(side) for side in SIDES}
    take_turns(runs, 1)  # to be traced
    turns = take_turns(runs, calls)
    medians = [1e3 * statistics.median(np.ravel(turns[side])) for side in SIDES]
    return (*medians, *compare(turns["stock"], turns["fast"]))


def interleaved(make, rounds):
    """Median milliseconds of each side, in turn, and quartiles of the ratio of each pair."""
    runs = {side: make(side) for side in SIDES}
    seconds = {side: [] for side in SIDES}
    for turn in range(rounds + 5):
        for side, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 5:
                seconds[side].append(1e3 * (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(seconds["stock"], seconds["fast"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(seconds[side]) for side in SIDES]
    return (*medians, median, low, high)


# --- op by op -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Share:
    milliseconds: float = 0.0
    ops: float = 0.0


def kind_of(name, op):
    """What an op is for, by its name in the graph and its type."""
    plain = op.removeprefix("_MklNative").removeprefix("_Mkl")
    if any(f"{optimizer}/" in name for optimizer in ("adam", "adam_1", "SGD", "sgd")):
        return "optimizer"
    if op.startswith("FastconvBatchNorm"):
        return "batch normalisation"
    if op.startswith("Fastconv") or "Conv2D" in plain or "DepthwiseConv" in plain:
        backward = "Grad" in op or "Backprop" in op
        pooled = "MaxPool2D" in op
        what = (
            "convolution and pooling" if pooled else "pooling" if "Pool2D" in op else "convolution"
        )
        return f"{what}, {'backward' if backward else 'forward'}"
    if "Pool" in plain:
        return f"pooling, {'backward' if 'Grad' in plain else 'forward'}"
    if plain in ("Relu", "Relu6", "ReluGrad", "Relu6Grad"):
        return "ReLU"
    if "batchnorm" in name or "moments" in name or "_bn" in name or "bn_" in name:
        return "batch normalisation"
    if "MatMul" in plain or "dense" in name or "predictions" in name:
        return "dense layers"
    if "loss" in name or "Softmax" in plain:
        return "loss and softmax"
    return "other"


def profile(run, rounds):
    """Milliseconds and numbers of ops a call, by kind."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for _ in range(10):
        run()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(
            folder, options=tf.profiler.experimental.ProfilerOptions(host_tracer_level=2)
        )
        for _ in range(rounds):
            run()
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        space.ParseFromString(trace.read_bytes())
    shares = collections.defaultdict(Share)
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name, colon, op = plane.event_metadata[event.metadata_id].name.rpartition(":")
            # An op's event is `its/name/in/the/graph:Type`.
            if not colon or not op.isidentifier() or "/" not in name:
                continue
            share = shares[kind_of(name, op)]
            share.milliseconds += event.duration_ps / 1e9 / rounds
            share.ops += 1 / rounds
    return shares


def table_of_ops(make, rounds):
    shares = {side: profile(make(side), rounds) for side in SIDES}
    kinds = {kind for side in SIDES for kind in shares[side]}
    rows = sorted(kinds, key=lambda kind: -max(shares[side][kind].milliseconds for side in SIDES))
    lines = [
        "| ops for | stock: ms | ops | fast: ms | ops |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in rows:
        cells = [
            f"{shares[side][kind].milliseconds:.2f} | {shares[side][kind].ops:.0f}"
            for side in SIDES
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    sums = [
        f"{sum(s.milliseconds for s in shares[side].values()):.2f} | "
        f"{sum(s.ops for s in shares[side].values()):.0f}"
        for side in SIDES
    ]
    lines.append(f"| **sum** | {' | '.join(sums)} |")
    return lines


# --- peak memory ----------------------------------------------------------------------------------


def peak_memory(name, side, batch):
    """MiB of a process that trains: its peak, and what it had before the network was built."""
    run = subprocess.run(
        [sys.executable, __file__, "--memory", name, side, str(batch)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    before, peak = map(float, run.stdout.split()[-2:])
    return before, peak


def print_memory(name, side, batch):
    import keras
    import tensorflow as tf

    import fastconv.keras

    del fastconv
    keras.ops.convert_to_numpy(tf.zeros(3))
    before = peak_resident()
    run = training(name, side, batch)
    for _ in range(10):
        run()
    print(before, peak_resident())


def peak_resident():
    """MiB that this process ever had; getrusage counts the process that made it as well."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


# --- the report -----------------------------------------------------------------------------------


def compared(what, values):
    stock, fast, ratio, low, high = values
    return f"| {what} | {stock:.2f} | {fast:.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"


COMPARED = ["| | stock: ms | fast: ms | ratio (quartiles) |", "| --- | ---: | ---: | --- |"]


def write(rounds):
    import keras
    import tensorflow as tf

    import fastconv

    info = fastconv.info()
    yield from [
        "# Where the time goes",
        "",
        "A training step and inference op by op, on Keras's layers and on fastconv's, and the memory they",
        "take at most. Written by `python bench/profile_step.py --report docs/profile.md`.",
        "",
        "TensorFlow's profiler tells how long each op ran; the tables sum them up by what they are for. Ops",
        "run beside one another and wait for cores, so their sum is no step's time. The times without",
        "profiler are medians of calls of both sides in turn, of the article's network ten calls a turn.",
        "",
        (
            f"TensorFlow {tf.__version__} with oneDNN, Keras {keras.__version__}, "
            f"fastconv {info['version']} on {info['isa']}, {info['num_threads']} threads on both "
            f"sides, XLA off; the machine's load at the beginning {os.getloadavg()[0]:.1f}."
        ),
        "",
        "## A training step of the article's network",
        "",
        "Batch 32, adam; where fast layers are used, each convolution and the pooling behind it are one op.",
        "",
    ]
    click.echo("article, training", err=True)
    yield from table_of_ops(lambda side: training("article", side, 32), rounds)
    yield ""
    yield from COMPARED
    yield compared("a step", in_turns(lambda side: training("article", side, 32), 3 * rounds))
    yield from ["", "## Its inference", ""]
    yield from COMPARED
    for batch in (1, 32, 256):
        click.echo(f"article, inference of {batch}", err=True)
        for what, way in (("`predict_on_batch`", predict), ("`tf.function`", compiled)):
            measured = in_turns(
                lambda side, way=way, batch=batch: way("article", side, batch), 3 * rounds
            )
            yield compared(f"{what}, batch {batch}", measured)
    yield from ["", "Op by op, of the call of 256:", ""]
    yield from table_of_ops(lambda side: compiled("article", side, 256), rounds)
    for name in NETWORKS:
        yield from ["", f"## {name}", "", "By `accelerate()`, images of 224 x 224.", ""]
        few = max(5, rounds // 10)
        yield from COMPARED
        click.echo(f"{name}, inference", err=True)
        yield compared(
            "inference of one image",
            interleaved(lambda side, name=name: compiled(name, side, 1), few * 3),
        )
        click.echo(f"{name}, training", err=True)
        yield compared(
            "a training step of 8 (SGD)",
            interleaved(lambda side, name=name: training(name, side, 8), few),
        )
        yield from ["", "Inference of one image, op by op:", ""]
        yield from table_of_ops(lambda side, name=name: compiled(name, side, 1), few)
        yield from ["", "A training step of 8, op by op:", ""]
        yield from table_of_ops(lambda side, name=name: training(name, side, 8), 3)
    yield from [
        "",
        "## Peak memory",
        "",
        "Resident memory of a process that takes ten training steps, at most, and by how much that is above",
        "what it had when TensorFlow, Keras and fastconv were imported, in MiB:",
        "",
        "| | stock | fast | stock, above imports | fast, above imports |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, batch in (("article", 32), *((name, 8) for name in NETWORKS)):
        click.echo(f"{name}, memory", err=True)
        memory = [peak_memory(name, side, batch) for side in SIDES]
        peaks = " | ".join(f"{peak:.0f}" for _, peak in memory)
        above = " | ".join(f"{peak - before:.0f}" for before, peak in memory)
        label = "the article's network" if name == "article" else name
        yield f"| {label}, batch {batch} | {peaks} | {above} |"


@click.command()
@click.option("--rounds", default=60, show_default=True, help="Profiled calls.")
@click.option("--report", type=click.Path(dir_okay=False), help="A file instead of the terminal.")
@click.option("--memory", nargs=3, hidden=True)
def main(rounds, report, memory):
    """Profile stock and fast layers, op by op."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if memory:
        name, side, batch = memory
        return print_memory(name, side, int(batch))
    text = "\n".join(write(rounds)) + "\n"
    if report:
        Path(report).write_text(text)
    else:
        click.echo(text)
    return None


if __name__ == "__main__":
    main()
