"""Figures of a trained model: its training, its mistakes, what its convolutions have learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display is asked for

from fastconv.mnist.article import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastconv.cli import Trained
    from fastconv.mnist.article import Result
    from fastconv.mnist.data import Mnist

_COLOURS = {"fast": "#0072B2", "stock": "#D55E00"}

_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.hashsalt": "fastconv",
    "svg.fonttype": "none",
}


def draw(trained: Trained, data: Mnist, directory: str | Path) -> list[Path]:
    """Draws ``trained``, {name of the layers: (model, Result)}, and returns the paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(_SETTINGS):
        for name, figure in _figures(trained, data):
            for ending in ("svg", "png"):
                paths.append(directory / f"{name}.{ending}")
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(paths[-1], bbox_inches="tight", metadata=metadata)
    return paths


def _figures(trained: Trained, data: Mnist) -> Iterator[tuple[str, Figure]]:
    yield "training", _training({name: result for name, (_, result) in trained.items()})
    images, _ = prepare(data.x_test, data.y_test)
    for name, (model, _) in trained.items():
        suffix = f"-{name}" if len(trained) > 1 else ""
        predicted = model.predict(images, verbose=0).argmax(axis=1)
        yield f"confusion{suffix}", _confusion(data.y_test, predicted)
        convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        yield f"filters{suffix}", _filters(convolutions)
        outputs = [layer.output for layer in convolutions]
        maps = keras.Model(model.inputs, outputs).predict(images[:1], verbose=0)
        yield f"features{suffix}", _features(data.x_test[0], [m[0] for m in maps])


def _training(results: dict[str, Result]) -> Figure:
    """Loss and accuracy an epoch, and what came of the test."""
    figure = Figure((6.2, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, ("loss", "accuracy"), strict=True):
        for name, result in results.items():
            values = result.history[key]
            epochs = np.arange(1, len(values) + 1)
            colour = _COLOURS[name]
            axes.plot(epochs, values, "o-", ms=3, lw=1.2, color=colour, label=f"{name}, training")
            axes.plot(epochs[-1], getattr(result, key), "*", ms=8, mec="white", mew=0.5,
                      color=colour, label=f"{name}, test after the last epoch")  # fmt: skip
        axes.set(xlabel="epoch", title=key)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dddddd", lw=0.5)
        axes.set_axisbelow(True)
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=7.5)
    return figure


def _confusion(labels: NDArray[Any], predicted: NDArray[Any]) -> Figure:
    """How many images of each digit were taken for which."""
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (np.asarray(labels, int), predicted), 1)
    figure = Figure((4.2, 3.8), layout="constrained")
    axes = figure.subplots()
    # Mistakes are few: a colour by the logarithm shows them, and none is left white.
    shown = np.where(counts > 0, np.log10(np.maximum(counts, 1)) + 0.3, 0)
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=max(1.0, shown.max()))
    for i, j in np.ndindex(counts.shape):
        if counts[i, j]:
            dark = shown[i, j] > 0.6 * shown.max()
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7,
                      color="white" if dark else "#333333")  # fmt: skip
    right = np.trace(counts)
    axes.set(
        xticks=range(10), yticks=range(10), xlabel="taken for", ylabel="digit",
        title=f"{right:,} of {counts.sum():,} test images right ({100 * right / counts.sum():.2f} %)",
    )  # fmt: skip
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _filters(convolutions: list[keras.layers.Conv2D]) -> Figure:
    """The taps of every filter: those of one channel as tiles, of more as a row a channel."""
    figure = Figure((6.8, 4.9), layout="constrained")
    shapes = [layer.kernel.shape for layer in convolutions]
    panels = figure.subplots(2, 1, height_ratios=(1, 4.4))
    for number, (axes, layer, shape) in enumerate(
        zip(panels, convolutions, shapes, strict=True), 1
    ):
        taps = np.asarray(layer.kernel)
        rows, columns, channels, filters = shape
        limit = float(np.abs(taps).max())
        # (channel, row, filter, column): a row of tiles for each channel, one tile a filter.
        tiles = np.full((channels, rows + 1, filters, columns + 1), np.nan)
        tiles[:, :rows, :, :columns] = taps.transpose(2, 0, 3, 1)
        if channels == 1:  # two rows of tiles instead of a single long one
            half = filters // 2
            tiles = np.concatenate([tiles[:, :, :half], tiles[:, :, half:]])
        picture = tiles.reshape(tiles.shape[0] * (rows + 1), -1)[:-1, :-1]
        image = axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")
        axes.set_title(f"convolution {number}: {filters} filters of {rows} x {columns} taps"
                       + (f" and {channels} channels" if channels > 1 else ""))  # fmt: skip
        axes.set(xticks=[], yticks=[])
        if channels > 1:
            axes.set(xlabel=f"filter (1 to {filters})", ylabel=f"channel (1 to {channels})")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    return figure


def _features(digit: NDArray[Any], maps: list[NDArray[Any]]) -> Figure:
    """What each filter of each convolution makes of one image, after ReLU."""
    per_row = 16
    pictures = [_mosaic(features, per_row) for features in maps]
    width = 6.8
    heights = [width * picture.shape[0] / picture.shape[1] for picture in pictures]
    figure = Figure((width, sum(heights) + 1.7), layout="constrained")
    panels = figure.subplots(1 + len(maps), 1, height_ratios=(0.8, *heights))
    panels[0].imshow(digit, cmap="gray_r", interpolation="none")
    panels[0].set_title("the image")
    for number, (axes, features, picture) in enumerate(
        zip(panels[1:], maps, pictures, strict=True), 1
    ):
        height, width, channels = features.shape
        axes.imshow(picture, cmap="magma", vmin=0, interpolation="none")
        axes.set_title(f"convolution {number}: {channels} maps of {height} x {width}")
    for axes in panels:
        axes.set_anchor("W")
        axes.set_axis_off()
    return figure


def _mosaic(features: NDArray[Any], per_row: int) -> NDArray[np.float32]:
    """Maps (row, column, channel) side by side in one picture, a gap of NaN between them."""
    height, width, channels = features.shape
    rows = -(-channels // per_row)
    gap = max(1, width // 12)
    tiles = np.full((rows * per_row, height + gap, width + gap), np.nan, np.float32)
    tiles[:channels, :height, :width] = features.transpose(2, 0, 1)
    picture = tiles.reshape(rows, per_row, height + gap, width + gap).transpose(0, 2, 1, 3)
    whole: NDArray[np.float32] = picture.reshape(rows * (height + gap), -1)[:-gap, :-gap]
    return whole
