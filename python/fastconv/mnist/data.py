"""Where MNIST comes from: a file, Keras's cache, Keras's download, or the packaged subset.

Nothing here imports TensorFlow, except that a download is left to ``keras.datasets.mnist``.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

Array: TypeAlias = NDArray[Any]

SUBSET = Path(__file__).with_name("subset.npz")
KEYS = ("x_train", "y_train", "x_test", "y_test")

# What keras.datasets.mnist downloads. Only asked whether it answers; Keras does the rest.
ORIGIN = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
ANSWER_SECONDS = 6.0  # for the first answer, name look-up included
STALL_SECONDS = 10.0  # for each further read

# What numpy and zipfile raise on files that are missing, cut off, encrypted, pickled or no archive.
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class DataError(ValueError):
    """A file that is not MNIST in Keras's layout; the message says why."""


@dataclasses.dataclass(frozen=True)
class Mnist:
    """Images (n, 28, 28) with values 0..255, labels 0..9, and a line on where they came from."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    source: str

    def limit(self, count: int) -> Mnist:
        """The first ``count`` training images and the first ``count`` test images."""
        first = {key: getattr(self, key)[:count] for key in KEYS}
        return dataclasses.replace(self, **first)

    def describe(self) -> str:
        """One line for people: how many images, from where, and why from there."""
        return (
            f"MNIST: {len(self.x_train):,} training and {len(self.x_test):,} test images, "
            f"{self.source}"
        )


def load(path: str | os.PathLike[str] | None = None) -> Mnist:
    """Reads ``path``; without one, Keras's cache, else its download, else the packaged subset.

    Raises:
        DataError: ``path`` cannot be read or is not MNIST in Keras's layout. The other sources
            are fallen back from, not failed on.
    """
    if path is not None:
        return read_npz(path, source=f"from {path}")
    reasons = []
    cache = keras_cache()
    if cache.exists():
        try:
            return read_npz(cache, source=f"from Keras's cache, {cache}")
        except DataError as error:
            reasons.append(f"Keras's cache cannot be used ({error})")
    try:
        return download()
    except Exception as error:  # noqa: BLE001 - whatever the network, a proxy or the disk may come up with
        reasons.append(f"the whole set could not be downloaded ({_one_line(error)})")
    return read_npz(
        SUBSET, source=f"the subset that ships with fastconv, because {' and '.join(reasons)}"
    )


def read_npz(path: str | os.PathLike[str], source: str) -> Mnist:
    """Reads and checks an .npz file in Keras's layout. Never unpickles."""
    try:
        arrays = _read_arrays(path)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(
            f"{path} must be a readable .npz archive of plain arrays. Received: {_one_line(error)}"
        ) from error
    for part in ("train", "test"):
        _check_images(path, f"x_{part}", arrays[f"x_{part}"])
        _check_labels(path, f"y_{part}", arrays[f"y_{part}"], len(arrays[f"x_{part}"]))
    return Mnist(**arrays, source=source)


def _read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path} must be an .npz archive. Received: a single array")
    with archive:
        missing = [key for key in KEYS if key not in archive.files]
        if missing:
            raise DataError(
                f"{path} must hold the arrays {', '.join(KEYS)}. "
                f"Received: {', '.join(archive.files) or 'no array'}"
            )
        # A member that is no array comes as bytes, which this makes an array of no dimension.
        return {key: np.asarray(archive[key]) for key in KEYS}


def keras_cache() -> Path:
    """The file ``keras.datasets.mnist`` keeps, found as Keras finds it but without importing it."""
    home = Path(os.environ.get("KERAS_HOME") or Path("~", ".keras")).expanduser()
    return home / "datasets" / "mnist.npz"


def download() -> Mnist:
    """Lets ``keras.datasets.mnist`` download the whole set, if its host answers soon."""
    wait_for_answer(ORIGIN, ANSWER_SECONDS)
    import keras

    with _socket_timeout(STALL_SECONDS):
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    return Mnist(x_train, y_train, x_test, y_test, "downloaded by keras.datasets.mnist")


def wait_for_answer(url: str, seconds: float) -> None:
    """Raises OSError unless ``url`` answers within ``seconds``.

    In a thread, because a socket's timeout bounds neither the look-up of the name nor the walk
    through all addresses of a host; behind a silent firewall those two take minutes.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds):  # noqa: S310 - Keras's address
                outcome.append(None)
        except Exception as error:  # noqa: BLE001 - raised again by who waits
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome[0] is not None:
        raise OSError(_one_line(outcome[0])) from outcome[0]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_images(path: str | os.PathLike[str], key: str, images: Array) -> None:
    if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
        raise DataError(
            f"{key} in {path} must have the shape (n, 28, 28), n > 0. Received: {images.shape}"
        )
    if images.dtype.kind not in "uif":
        raise DataError(f"{key} in {path} must be integer or float. Received: {images.dtype}")
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 255):  # a NaN fails too
        raise DataError(
            f"{key} in {path} must lie between 0 and 255. Received: from {low} to {high}"
        )


def _check_labels(path: str | os.PathLike[str], key: str, labels: Array, count: int) -> None:
    if labels.shape != (count,):
        raise DataError(
            f"{key} in {path} must hold one label an image, the shape ({count},). "
            f"Received: {labels.shape}"
        )
    if labels.dtype.kind not in "ui":
        raise DataError(f"{key} in {path} must be integer. Received: {labels.dtype}")
    low, high = labels.min(), labels.max()
    if low < 0 or high > 9:
        raise DataError(f"{key} in {path} must lie between 0 and 9. Received: from {low} to {high}")


def _one_line(error: BaseException) -> str:
    """What an exception says, on one line, without urllib's wrapping and OSError's path."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        error = reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
