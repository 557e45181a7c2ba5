#!/usr/bin/env python3
"""Makes the subset of MNIST that ships in the package out of the whole set.

    python tools/make_mnist_subset.py SOURCE [DESTINATION]

SOURCE is the mnist.npz of keras.datasets.mnist. Every sixth training image and every fifth test
image are kept, in their order: the first half of MNIST's test set comes from other writers than
the second, so its first 2,000 images would not stand for it.
"""

import argparse
from pathlib import Path

import numpy as np

STEPS = {"train": 6, "test": 5}
DESTINATION = Path(__file__).parents[1] / "python" / "fastconv" / "mnist" / "subset.npz"


def subset(source):
    """The arrays of the subset, by their names in Keras's layout."""
    with np.load(source, allow_pickle=False) as whole:
        return {
            f"{kind}_{part}": whole[f"{kind}_{part}"][::step]
            for part, step in STEPS.items()
            for kind in "xy"
        }


def main():
    parser = argparse.ArgumentParser(description="Make the packaged subset of MNIST.")
    parser.add_argument("source", type=Path, help="Keras's mnist.npz")
    parser.add_argument("destination", type=Path, nargs="?", default=DESTINATION)
    options = parser.parse_args()
    arrays = subset(options.source)
    np.savez_compressed(options.destination, **arrays)  # writes no dates: same input, same bytes
    for name, array in arrays.items():
        print(f"{name}: {array.shape} {array.dtype}")
    for part in STEPS:
        print(f"images of each digit, {part}: {np.bincount(arrays[f'y_{part}'])}")
    print(f"{options.destination}: {options.destination.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
