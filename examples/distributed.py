"""The tutorial's network on several replicas: the fast layers under tf.distribute, on CPUs.

    python examples/distributed.py mirrored   # one process, two logical CPUs, model.fit
    python examples/distributed.py workers    # two processes on this machine, a loop of one's own

Each prints a line of the losses and of a checksum of the weights for every replica or worker, and
at last one of a single process that trains on the same batches: they agree.

With two workers the training loop is written out: under MultiWorkerMirroredStrategy,
``model.fit`` of Keras (seen up to 3.15) fails for stock and fast layers alike. With ``workers
--fit`` the workers try it with stock layers and print what became of it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from fastconv.keras import FastConv2D, FastMaxPooling2D
from fastconv.mnist import data

BATCH = 32  # of all replicas together
STEPS = 4
EPOCHS = 2


def make_model(fast=True):
    """The tutorial's network, the same weights in every process."""
    keras.utils.set_random_seed(7)
    conv = FastConv2D if fast else keras.layers.Conv2D
    pool = FastMaxPooling2D if fast else keras.layers.MaxPooling2D
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            conv(32, 3, activation="relu"),
            pool(2),
            conv(64, 3, activation="relu"),
            pool(2),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def make_dataset():
    mnist = data.read_npz(data.SUBSET, source="the packaged subset").limit(BATCH * STEPS)
    images = mnist.x_train[..., None].astype("float32") / 255
    labels = mnist.y_train.astype("int64")
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH, drop_remainder=True)


def make_loss(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def checksum(weights):
    return float(sum(np.abs(weight, dtype="float64").sum() for weight in weights))


def report(who, losses, weights, **more):
    """One line of JSON, for people and for the test of this example."""
    line = {"who": who, "losses": losses, "weights": checksum(weights), **more}
    print(json.dumps(line), flush=True)


def train_alone():
    """One process, one replica, model.fit."""
    model = make_model()
    model.compile(keras.optimizers.SGD(0.1), make_loss())
    return model.fit(make_dataset(), epochs=EPOCHS, verbose=0).history["loss"], model


def mirrored():
    """MirroredStrategy over two logical CPUs of this process."""
    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), make_loss())
    losses = model.fit(make_dataset(), epochs=EPOCHS, verbose=0).history["loss"]
    replicas = [
        [value.numpy() for value in strategy.experimental_local_results(variable.value)]
        for variable in model.trainable_variables
    ]
    for number, weights in enumerate(zip(*replicas, strict=True)):
        report(f"replica {number}", losses, weights)
    losses, model = train_alone()
    report("alone", losses, model.get_weights())


def worker(try_fit):
    """What each of the two processes runs; TF_CONFIG in its environment tells it who it is."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = make_model()
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
    loss_of = make_loss(reduction="sum")

    def step_of_replica(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True)) / BATCH
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums them over the workers
        return loss

    @tf.function
    def step(batch):
        return strategy.reduce("SUM", strategy.run(step_of_replica, args=batch), axis=None)

    batches = strategy.experimental_distribute_dataset(make_dataset())  # half of each batch to each
    losses = [float(np.mean([step(batch) for batch in batches])) for _ in range(EPOCHS)]
    number = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    fit = {"fit": try_to_fit(strategy)} if try_fit else {}
    report(f"worker {number}", losses, model.get_weights(), **fit)


def try_to_fit(strategy):
    with strategy.scope():
        model = make_model(fast=False)
        model.compile(keras.optimizers.SGD(0.1), make_loss())
    try:
        model.fit(make_dataset(), epochs=1, verbose=0)
    except Exception as error:  # noqa: BLE001 - whatever Keras raises is what is to be shown
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:40]} ... {text[-120:]}"
    return "works"


def workers(try_fit):
    """Starts the two processes, waits for them, and trains alone for comparison."""
    ports = [free_port() for _ in range(2)]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    processes = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        command = [sys.executable, __file__, "worker", *(["--fit"] if try_fit else [])]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            print(output, end="", flush=True)
        if any(process.returncode for process in processes):
            sys.exit("a worker failed")
    finally:
        for process in processes:
            process.kill()
    losses, model = train_alone()
    report("alone", losses, model.get_weights())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["mirrored", "workers", "worker"])
    parser.add_argument("--fit", action="store_true", help="let the workers try model.fit as well")
    arguments = parser.parse_args()
    if arguments.mode == "mirrored":
        mirrored()
    else:
        {"workers": workers, "worker": worker}[arguments.mode](arguments.fit)
