"""One training step of the article's MNIST model, stock and fast, interleaved in one run.

    python bench/train_step.py [--steps 200] [--batch-size 32] [--steps-per-execution 1] [--jit]
    python bench/train_step.py --best

Times the compiled train function on one batch that stays in memory: no input pipeline and no
progress bar, which are the same on both sides. XLA is off, the faster mode of the stock layers on a
CPU; --jit turns it on for both sides, and --best takes either side in the faster of the two modes.
The sides take turns of some calls, the first two untimed: in training, a step follows one of its own
library, not one that left the other's data in the caches and the other's threads waiting for work.
Prints the median, the quartiles and the ratio of each pair of turns.
"""

import statistics
import time

import click
import numpy as np


def build(layers, jit, steps_per_execution=1, seed=0):
    import keras

    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers[0](32, (3, 3), activation="relu"),
            layers[1]((2, 2)),
            layers[0](64, (3, 3), activation="relu"),
            layers[1]((2, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        "adam",
        "categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=jit,
        steps_per_execution=steps_per_execution,
    )
    return model


def stepper(model, data):
    """A function that takes one train-function call and returns when its result is there."""
    import tensorflow as tf

    model.make_train_function()
    step = model.train_function
    dataset = tf.data.Dataset.from_tensors(data).cache().repeat()
    iterator = iter(dataset.prefetch(4))

    def run():
        logs = step(iterator)
        float(logs["loss"])

    return run


TURN = 10  # calls, timed


def take_turns(runs, calls):
    """Seconds of each run's calls, in turns: {key: [turn: [call: seconds]]}."""
    seconds = {key: [] for key in runs}
    for _ in range(-(-calls // TURN)):
        for key, run in runs.items():
            turn = []
            for i in range(-2, TURN):
                start = time.perf_counter()
                run()
                if i >= 0:
                    turn.append(time.perf_counter() - start)
            seconds[key].append(turn)
    return seconds


def compare(stock, fast):
    """Median and quartiles of the ratio of each pair of turns."""
    pairs = zip(stock, fast, strict=True)
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, low, high


@click.command()
@click.option("--steps", default=200, show_default=True, help="Timed calls of each side.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--steps-per-execution", default=1, show_default=True)
@click.option("--jit", is_flag=True, help="Compile both sides with XLA.")
@click.option("--best", is_flag=True, help="Either side with or without XLA, as is faster.")
def main(steps, batch_size, steps_per_execution, jit, best):
    """Time stock and fast training steps in turn."""
    import keras
    import tensorflow as tf

    import fastconv
    from fastconv.keras import FastConv2D, FastMaxPooling2D

    rng = np.random.default_rng(0)
    data = (
        rng.random((batch_size, 28, 28, 1), "float32"),
        np.eye(10, dtype="float32")[rng.integers(10, size=batch_size)],
    )
    sides = {
        "stock": (keras.layers.Conv2D, keras.layers.MaxPooling2D),
        "fast": (FastConv2D, FastMaxPooling2D),
    }
    modes = (False, True) if best else (jit,)
    runs = {
        (name, mode): stepper(build(layers, mode, steps_per_execution), data)
        for name, layers in sides.items()
        for mode in modes
    }
    for _ in range(30):
        for run in runs.values():
            run()
    turns = take_turns(runs, steps)
    timed = {key: [second for turn in turns[key] for second in turn] for key in runs}
    chosen = {
        name: min(modes, key=lambda mode: statistics.median(timed[name, mode])) for name in sides
    }

    info = fastconv.info()
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, fastconv {info['version']} on "
        f"{info['isa']}, {info['num_threads']} threads, batch {batch_size}, steps_per_execution "
        f"{steps_per_execution}, jit {' / '.join('on' if chosen[name] else 'off' for name in sides)}"
        f", turns of {TURN} calls"
    )
    for name in sides:
        values = timed[name, chosen[name]]
        low, median, high = (
            1e3 / steps_per_execution * q for q in statistics.quantiles(values, n=4)
        )
        print(f"{name:>6}: median {median:6.3f} ms a step, quartiles {low:.3f} .. {high:.3f}")
    median, low, high = compare(*(turns[name, chosen[name]] for name in sides))
    print(f" ratio: median {median:.2f} (stock / fast), quartiles {low:.2f} .. {high:.2f}")


if __name__ == "__main__":
    main()
