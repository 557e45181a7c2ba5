"""The loss over the article's ten epochs, of stock and fast layers, for several seeds, as a plot.

    python bench/loss_curves.py [--data mnist.npz] [--epochs 10] [--seeds 3] [--figure FILE.svg]

With one seed both sides begin with the same weights and see the same images in the same order. Their
losses drift apart as rounding errors grow, as do those of two machines. The question is by how much:
the plot shows the losses, and their differences beside those of two seeds of the stock layers.
"""

import itertools
import os

import click
import numpy as np


def curves(layers, data, epochs, seed):
    """Losses and accuracies by epoch: of training, and of the test set."""
    from train_step import build

    (images, labels), test = data
    model = build(layers, jit=False, seed=seed)
    history = model.fit(
        images, labels, batch_size=32, epochs=epochs, validation_data=test, verbose=0
    ).history
    return {key: np.array(values) for key, values in history.items()}


def load(path):
    import keras

    if path is None:
        arrays = keras.datasets.mnist.load_data()
    else:
        with np.load(path, allow_pickle=False) as file:
            arrays = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    return [
        (images[..., None].astype("float32") / 255, np.eye(10, dtype="float32")[labels])
        for images, labels in arrays
    ]


def draw(results, figure):
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastconv"
    from matplotlib import pyplot

    plot, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    colours = {"stock": "#c05020", "fast": "#2060c0"}
    for side, runs in results.items():
        for seed, run in enumerate(runs):
            label = side if seed == 0 else None
            epochs = np.arange(1, len(run["loss"]) + 1)
            style = {"color": colours[side], "linewidth": 1.2, "label": label}
            left.plot(epochs, run["loss"], linestyle="-" if side == "stock" else "--", **style)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log", title="Losses, each seed")
    left.legend()
    stock, fast = results["stock"], results["fast"]
    for index, (one, other) in enumerate(itertools.combinations(stock, 2)):
        label = "two seeds, both stock" if index == 0 else None
        right.plot(epochs, abs(one["loss"] - other["loss"]), color="#909090", label=label)
    for seed, (one, other) in enumerate(zip(stock, fast, strict=True)):
        label = "one seed, stock and fast" if seed == 0 else None
        right.plot(epochs, abs(one["loss"] - other["loss"]), color="#208040", label=label)
    right.set(xlabel="epoch", ylabel="difference", yscale="log", title="Differences of losses")
    right.legend()
    plot.savefig(figure, metadata={"Date": None})


def report(results):
    stock, fast = results["stock"], results["fast"]
    print("seed  side   loss     accuracy  test loss  test accuracy")
    for seed, pair in enumerate(zip(stock, fast, strict=True)):
        for side, run in zip(results, pair, strict=True):
            last = [run[key][-1] for key in ("loss", "accuracy", "val_loss", "val_accuracy")]
            print(
                f"{seed:>4}  {side:<5}  {last[0]:.5f}  {last[1]:.5f}   {last[2]:.5f}    {last[3]:.4f}"
            )
    sides = [abs(a["loss"] - b["loss"]) for a, b in zip(stock, fast, strict=True)]
    seeds = [abs(a["loss"] - b["loss"]) for a, b in itertools.combinations(stock, 2)]
    print(
        "differences of the training loss, mean over epochs and runs: "
        f"stock and fast, one seed {np.mean(sides):.5f}; two seeds, both stock {np.mean(seeds):.5f}"
    )
    means = {side: np.mean([run["loss"] for run in runs], 0) for side, runs in results.items()}
    apart = abs(means["stock"] - means["fast"]).max()
    print(f"largest difference of the two sides' mean losses {apart:.5f}")


@click.command()
@click.option("--data", type=click.Path(exists=True), help="MNIST as .npz in Keras's layout.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--figure", default="loss_curves.svg", show_default=True, help="Where to draw.")
def main(data, epochs, seeds, figure):
    """Train the article's network on stock and on fast layers and compare the losses."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    from fastconv.keras import FastConv2D, FastMaxPooling2D

    sides = {
        "stock": (keras.layers.Conv2D, keras.layers.MaxPooling2D),
        "fast": (FastConv2D, FastMaxPooling2D),
    }
    arrays = load(data)
    results = {side: [] for side in sides}
    for seed in range(seeds):
        for side, layers in sides.items():
            print(f"seed {seed}, {side} ...", flush=True)
            results[side].append(curves(layers, arrays, epochs, seed))
    draw(results, figure)
    report(results)


if __name__ == "__main__":
    main()
