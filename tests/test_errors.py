"""Every wrong argument of every function: which exception, and what its message ends in.

The layers' table is in test_keras_errors.py, the commands' in test_cli_errors.py.
"""

import inspect
import re

import numpy as np
import pytest

import fastconv
from fastconv import _arguments, _core
from running import running_on

X = np.ones((2, 6, 7, 4), np.float32)
W = np.ones((3, 2, 4, 5), np.float32)
Y = np.ones((2, 4, 6, 5), np.float32)  # conv2d(X, W)
POOLED = np.ones((2, 3, 3, 4), np.float32)  # max_pool2d(X, 2)
ARGMAX = np.zeros((2, 3, 3, 4), np.uint8)

FUSED = np.ones((2, 2, 3, 5), np.float32)  # conv2d_max_pool2d(X, W)
TAPS = np.zeros((2, 2, 3, 5), np.uint8)

W_INT8, W_SCALE = fastconv.quantize_filter(W)

# Arguments each function accepts; a row of the table below changes some of them.
ACCEPTED = {
    fastconv.conv2d: {"x": X, "w": W},
    fastconv.PackedFilter: {"w": W},
    fastconv.conv2d_grad_input: {"dy": Y, "w": W, "input_shape": X.shape},
    fastconv.conv2d_grad_filter: {"x": X, "dy": Y, "filter_shape": W.shape},
    fastconv.conv2d_max_pool2d: {"x": X, "w": W},
    fastconv.conv2d_max_pool2d_grad: {
        "x": X,
        "w": W,
        "dy": FUSED,
        "output": FUSED,
        "argmax": TAPS,
    },
    fastconv.conv2d_int8: {"x": X, "w": W_INT8, "w_scale": W_SCALE},
    fastconv.quantize_filter: {"w": W},
    fastconv.max_pool2d: {"x": X, "pool_size": 2},
    fastconv.max_pool2d_grad: {
        "dy": POOLED,
        "argmax": ARGMAX,
        "input_shape": X.shape,
        "pool_size": 2,
    },
    fastconv.avg_pool2d: {"x": X, "pool_size": 2},
    fastconv.avg_pool2d_grad: {"dy": POOLED, "input_shape": X.shape, "pool_size": 2},
    fastconv.explain: {"input_shape": X.shape, "filter_shape": W.shape},
    fastconv.set_accuracy: {"accuracy": "default"},
    fastconv.set_num_threads: {"num_threads": 1},
    _core.set_isa: {"name": "scalar"},
    _core.set_algorithm: {"algorithm": "auto"},
}
# Those without arguments can fail by the environment alone: tests/test_threads.py.
WITHOUT_ARGUMENTS = {"__version__", "get_accuracy", "get_num_threads", "info"}
# Any object will do for these: it is true or it is not.
TRUTHS = {"return_argmax", "return_bias_grad", "with_input_grad"}

CONVOLUTIONS = [fastconv.conv2d, fastconv.conv2d_grad_input, fastconv.conv2d_grad_filter]
FUSED_ONES = [fastconv.conv2d_max_pool2d, fastconv.conv2d_max_pool2d_grad]
GRADIENTS = CONVOLUTIONS[1:]
MAX_POOLINGS = [fastconv.max_pool2d, fastconv.max_pool2d_grad]
AVG_POOLINGS = [fastconv.avg_pool2d, fastconv.avg_pool2d_grad]
POOLINGS = MAX_POOLINGS + AVG_POOLINGS
# With the options of a convolution.
CONVOLVING = [*CONVOLUTIONS, *FUSED_ONES, fastconv.conv2d_int8, fastconv.explain]


def lazily(shape):
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def wrong_arrays(functions, name, array):
    """Rows for an argument that must be an array of floats like ``array``."""
    swapped = array.astype(array.dtype.newbyteorder())
    kinds = [
        (array.tolist(), f"{name} of type list"),
        (1.5, f"{name} of type float"),
        (np.float32(1), f"{name} of type float32"),
        (array.astype(np.float64), f"{name}.dtype=float64"),
        (array.astype(np.int16), f"{name}.dtype=int16"),  # float16: test_sixteen_bits.py
        (array.astype(np.int32), f"{name}.dtype=int32"),
        (array.astype(np.complex64), f"{name}.dtype=complex64"),
        (array.astype(object), f"{name}.dtype=object"),
        (array.astype(bool), f"{name}.dtype=bool"),
        (swapped, f"{name}.dtype=>f4"),
    ]
    shapes = [
        (array[0], f"{name}.shape={array.shape[1:]}"),
        (array[None], f"{name}.shape={(1, *array.shape)}"),
        (array[0, 0, 0, 0:1].reshape(()), f"{name}.shape=()"),
    ]
    for function in functions:
        for value, received in kinds:
            yield function, {name: value}, TypeError, received
        for value, received in shapes:
            yield function, {name: value}, ValueError, received
        yield function, {name: None}, TypeError, f"{name} of type NoneType"


def wrong_integers(functions, name, *, pair):
    """Rows for an argument that must be an integer, or, with ``pair``, a pair of them."""
    kinds = [True, np.True_, 1.5, 2.0, "2", b"2", 1j, {1, 2}, {1: 2}, np.float32(1), np.array(1.5)]
    kinds += [(1, 1.5), (1, True), ("1", "2"), (1, (1, 1)), np.array([1.0, 2.0])]
    values = [0, -1, 2**31, 2**63, -(2**63) - 1]
    lengths = [(), (1,), (1, 2, 3), [1, 2, 3], np.array([1])]
    if not pair:
        kinds += lengths
    for function in functions:
        for value in kinds:
            yield function, {name: value}, TypeError, f"{name}={value!r}"
        for value in values:
            fits = -(2**63) <= value < 2**63
            shown = (value, value) if pair and fits else value
            yield function, {name: value}, ValueError, f"{name}={shown!r}"
        if not pair:
            continue
        for value in lengths:
            yield function, {name: value}, ValueError, f"{name}={value!r}"
        for value in [(0, 1), (1, 0), (1, -1), (1, 2**31), (2**63, 1)]:
            yield function, {name: value}, ValueError, f"{name}={value!r}"


def wrong_shapes(functions, name, good):
    """Rows for an argument that is the shape of an array."""
    kinds = [None, 4, "2674", True, {2, 6, 7, 4}, (2.0, 6, 7, 4), (2, True, 7, 4), X[0, 0, 0]]
    values = [(), good[1:], (*good, 1), (-1, *good[1:]), (*good[:3], 2**63), np.array(good[1:])]
    for function in functions:
        for value in kinds:
            yield function, {name: value}, TypeError, f"{name}={value!r}"
        for value in values:
            yield function, {name: value}, ValueError, f"{name}={value!r}"


def wrong_padding(functions):
    kinds = [None, 1, True, 1.5, b"same", {"same"}, (1, 1), ((1, 1), 1), ("same", "same")]
    kinds += [((1, 1), (1, 1.5)), ((True, 1), (1, 1)), ((1, 1), None)]
    values = ["full", "", "causal", (), ((1, 1),), ((1, 1), (1,)), ((1, 1), (1, 1), (1, 1))]
    values += [((1, 1), (1, 2**63)), ((-1, 0), (0, 0)), ((0, 0), (0, 2**31))]
    for function in functions:
        for value in kinds:
            yield function, {"padding": value}, TypeError, f"padding={value!r}"
        for value in values:
            yield function, {"padding": value}, ValueError, f"padding={value!r}"


def wrong_outs(functions):
    for function in functions:
        accepted = ACCEPTED[function]
        result = function(**accepted)
        shape = (result[0] if isinstance(result, tuple) else result).shape
        spread = np.zeros((*shape[:3], 2 * shape[3]), np.float32)[..., ::2]
        unwriteable = np.zeros(shape, np.float32)
        unwriteable.flags.writeable = False
        yield function, {"out": [1.0]}, TypeError, "out of type list"
        yield function, {"out": np.zeros(shape)}, TypeError, "out.dtype=float64"
        yield function, {"out": np.zeros(shape, ">f4")}, TypeError, "out.dtype=>f4"
        wrong = np.zeros(shape[1:], np.float32)
        yield function, {"out": wrong}, ValueError, f"out.shape={wrong.shape}"
        yield function, {"out": spread}, ValueError, f"out with strides {spread.strides}"
        received = f"out with strides {unwriteable.strides}, not writeable"
        yield function, {"out": unwriteable}, ValueError, received
        for name, array in accepted.items():
            if isinstance(array, np.ndarray) and array.dtype == np.float32:
                memory = np.ones(max(array.size, int(np.prod(shape))), np.float32)
                shared = memory[: array.size].reshape(array.shape)
                out = memory[: int(np.prod(shape))].reshape(shape)
                yield function, {name: shared, "out": out}, ValueError, "out that does"


def wrong_algorithms(functions):
    for function in functions:
        for value in (3, b"direct", ["direct"], True):
            yield function, {"algorithm": value}, TypeError, f"algorithm={value!r}"
        for value in ("", "fft", "DIRECT", "auto", "depthwise"):  # the last serves groups alone
            yield function, {"algorithm": value}, ValueError, f"algorithm={value!r}"


def wrong_names(functions, name):
    for function in functions:
        for value in [1, True, b"relu", ["relu"], len]:
            yield function, {name: value}, TypeError, f"{name}={value!r}"
        for value in ["", "nonsense", "RELU", "Channels_Last"]:
            yield function, {name: value}, ValueError, f"{name}={value!r}"


def table():
    conv2d, grad_input, grad_filter = CONVOLUTIONS
    max_pool2d, max_pool2d_grad = MAX_POOLINGS
    avg_pool2d, avg_pool2d_grad = AVG_POOLINGS
    fused, fused_grad = FUSED_ONES
    explain = fastconv.explain
    int8, quantize = fastconv.conv2d_int8, fastconv.quantize_filter

    with_x = [conv2d, grad_filter, *FUSED_ONES, int8, max_pool2d, avg_pool2d]
    yield from wrong_arrays(with_x, "x", X)
    with_w = [conv2d, grad_input, *FUSED_ONES, quantize, fastconv.PackedFilter]
    yield from wrong_arrays(with_w, "w", W)
    yield from wrong_arrays(GRADIENTS, "dy", Y)
    yield from wrong_arrays([fused_grad], "dy", FUSED)
    yield from wrong_arrays([fused_grad], "output", FUSED)
    yield from wrong_arrays([max_pool2d_grad, avg_pool2d_grad], "dy", POOLED)
    yield from wrong_integers(CONVOLVING, "strides", pair=True)
    yield from wrong_integers(CONVOLVING, "dilation_rate", pair=True)
    yield from wrong_integers(CONVOLVING, "groups", pair=False)
    yield from wrong_integers(POOLINGS, "pool_size", pair=True)
    yield from wrong_integers(POOLINGS, "strides", pair=True)
    yield from wrong_integers([fastconv.set_num_threads], "num_threads", pair=False)
    yield from wrong_shapes([grad_input, explain], "input_shape", X.shape)
    yield from wrong_shapes([grad_filter, explain], "filter_shape", W.shape)
    yield from wrong_shapes([max_pool2d_grad, avg_pool2d_grad], "input_shape", X.shape)
    yield from wrong_padding(CONVOLVING + POOLINGS)
    yield from wrong_names(CONVOLVING, "activation")
    yield from wrong_names(CONVOLVING + POOLINGS, "data_format")
    yield from wrong_names([explain], "direction")
    yield from wrong_names([explain], "dtype")
    yield from wrong_names([fastconv.set_accuracy], "accuracy")
    yield from wrong_outs([*CONVOLUTIONS, fused, int8, *POOLINGS])
    yield from wrong_algorithms([*CONVOLUTIONS, *FUSED_ONES, int8])
    for value in ("", "fft", "DIRECT"):
        yield _core.set_algorithm, {"algorithm": value}, ValueError, f"algorithm={value!r}"
    yield fastconv.set_accuracy, {"accuracy": None}, TypeError, "accuracy=None"
    yield explain, {"direction": None}, TypeError, "direction=None"
    for function in CONVOLVING + POOLINGS:
        yield function, {"data_format": None}, TypeError, "data_format=None"
    for function in CONVOLVING:
        yield function, {"strides": None}, TypeError, "strides=None"
        yield function, {"dilation_rate": None}, TypeError, "dilation_rate=None"
        yield function, {"groups": None}, TypeError, "groups=None"
    for function in POOLINGS:
        yield function, {"pool_size": None}, TypeError, "pool_size=None"
    yield fastconv.set_num_threads, {"num_threads": None}, TypeError, "num_threads=None"
    for threads in (1025, 2**31 + 1, 2**32 + 1, 2**63 - 1):
        received = f"num_threads={threads}"
        yield fastconv.set_num_threads, {"num_threads": threads}, ValueError, received
    yield _core.set_isa, {"name": "sse9"}, ValueError, "isa=sse9"
    yield _core.set_isa, {"name": ""}, ValueError, "isa="

    # bias
    bias = np.ones(5, np.float32)
    for function in (conv2d, fused, int8):
        yield function, {"bias": bias.tolist()}, TypeError, "bias of type list"
        yield function, {"bias": 1.0}, TypeError, "bias of type float"
        yield function, {"bias": bias.astype(np.float64)}, TypeError, "bias.dtype=float64"
        yield function, {"bias": bias.astype(">f4")}, TypeError, "bias.dtype=>f4"
        yield function, {"bias": bias[:4]}, ValueError, "bias.shape=(4,)"
        yield function, {"bias": bias[None]}, ValueError, "bias.shape=(1, 5)"
        yield function, {"bias": np.float32(1).reshape(())}, TypeError, "bias of type float32"
        yield function, {"bias": np.array(1, np.float32)}, ValueError, "bias.shape=()"

    # filters of int8 and their scales
    yield int8, {"w": W_INT8.tolist()}, TypeError, "w of type list"
    yield int8, {"w": None}, TypeError, "w of type NoneType"
    for dtype in (np.uint8, np.int16, np.float32, bool):
        yield int8, {"w": W_INT8.astype(dtype)}, TypeError, f"w.dtype={np.dtype(dtype)}"
    for wrong in (W_INT8[0], W_INT8[:0], W_INT8[..., :0], W_INT8[:, :, :3]):
        received = f"w.shape={wrong.shape}"
        groups = ", groups=1" if wrong.shape[2:] == (3, 5) else ""
        yield int8, {"w": wrong}, ValueError, received + groups
    yield int8, {"w_scale": None}, TypeError, "w_scale of type NoneType"
    yield int8, {"w_scale": 1.5}, TypeError, "w_scale of type float"
    for dtype in (np.float64, np.int8, ">f4"):
        received = f"w_scale.dtype={np.dtype(dtype)}"
        yield int8, {"w_scale": W_SCALE.astype(dtype)}, TypeError, received
    for wrong in (W_SCALE[:4], W_SCALE[None]):
        yield int8, {"w_scale": wrong}, ValueError, f"w_scale.shape={wrong.shape}"
    # more products than fit 32 bits
    for channels, kernel in ((2**17 + 1, (1, 1)), (2, (2**16 + 1, 1)), (1, (2**9, 2**9))):
        x, w = lazily((1, *kernel, channels)), np.zeros((*kernel, channels, 1), np.int8)
        wrong = {"x": x, "w": w, "w_scale": W_SCALE[:1]}
        yield int8, wrong, ValueError, f"w.shape={w.shape}"
    for axis in range(4):
        empty = np.delete(W, np.s_[:], axis)
        yield quantize, {"w": empty}, ValueError, f"w.shape={empty.shape}"
    for value in (np.nan, np.inf, -np.inf):
        wrong = W.copy()
        wrong[1, 1, 2, 3] = value
        yield quantize, {"w": wrong}, ValueError, "w with NaN or infinity"

    # shapes that do not fit each other, called what the caller calls them
    for function in (conv2d, *FUSED_ONES):
        yield function, {"w": W[:, :, :3]}, ValueError, "w.shape=(3, 2, 3, 5), groups=1"
        yield function, {"groups": 3}, ValueError, "x.shape=(2, 6, 7, 4), groups=3"
        wrong = {"groups": 2, "w": W[:, :, :2]}
        yield function, wrong, ValueError, "w.shape=(3, 2, 2, 5), groups=2"
        yield function, {"data_format": "channels_first"}, ValueError, "groups=1"
    for function in CONVOLVING:
        yield function, {"groups": 2}, ValueError, "groups=2"
        yield function, {"groups": 2**31}, ValueError, f"groups={2**31}"
    received = "input_shape=(2, 6, 7, 4), w.shape=(3, 2, 3, 5), groups=1"
    yield grad_input, {"w": W[:, :, :3]}, ValueError, received
    received = "x.shape=(2, 6, 7, 4), filter_shape=(3, 2, 3, 5), groups=1"
    yield grad_filter, {"filter_shape": (3, 2, 3, 5)}, ValueError, received
    received = "input_shape=(2, 6, 7, 4), filter_shape=(3, 2, 3, 5), groups=1"
    yield explain, {"filter_shape": (3, 2, 3, 5)}, ValueError, received
    for axis in range(4):
        empty = np.delete(W, np.s_[:], axis)
        for function in (conv2d, *FUSED_ONES, grad_input):
            yield function, {"w": empty}, ValueError, f"w.shape={empty.shape}"
        for function in (grad_filter, explain):
            wrong = {"filter_shape": empty.shape}
            yield function, wrong, ValueError, f"filter_shape={empty.shape}"
    for axis in range(1, 4):
        empty = np.delete(X, np.s_[:], axis)
        for function in (conv2d, *FUSED_ONES, int8, grad_filter, max_pool2d, avg_pool2d):
            yield function, {"x": empty}, ValueError, f"x.shape={empty.shape}"
        for function in (grad_input, explain, max_pool2d_grad, avg_pool2d_grad):
            wrong = {"input_shape": empty.shape}
            yield function, wrong, ValueError, f"input_shape={empty.shape}"
    yield explain, {"filter_shape": None}, TypeError, "filter_shape=None"
    for function in GRADIENTS:
        for wrong in (Y[:1], Y[:, :3], Y[:, :, :5], Y[..., :4], Y.transpose(0, 3, 1, 2)):
            yield function, {"dy": wrong}, ValueError, f"dy.shape={wrong.shape}"
        yield function, {"strides": 2}, ValueError, f"dy.shape={Y.shape}"
        yield function, {"padding": "same"}, ValueError, f"dy.shape={Y.shape}"
    for function in (max_pool2d_grad, avg_pool2d_grad):
        for wrong in (POOLED[:1], POOLED[:, :2], POOLED[:, :, :2], POOLED[..., :3]):
            yield function, {"dy": wrong}, ValueError, f"dy.shape={wrong.shape}"
        yield function, {"strides": 1}, ValueError, f"dy.shape={POOLED.shape}"
    for name, array in (("dy", FUSED), ("output", FUSED), ("argmax", TAPS)):
        for wrong in (array[:1], array[:, :1], array[:, :, :2], array[..., :4], array[0]):
            yield fused_grad, {name: wrong}, ValueError, f"{name}.shape={wrong.shape}"
    yield fused_grad, {"padding": "same"}, ValueError, f"dy.shape={FUSED.shape}"
    for function in FUSED_ONES:
        one = {"w": np.ones((6, 7, 4, 5), np.float32)}
        yield function, one, ValueError, "an output of 1 x 1"
        yield function, {"strides": (1, 6)}, ValueError, "an output of 4 x 1"

    # windows that do not fit the input
    for function in CONVOLVING:
        dilated = r"dilation_rate=(3, 1), padding=((0, 0), (0, 0))"
        yield function, {"dilation_rate": (3, 1)}, ValueError, dilated
        dilated = r"dilation_rate=(1, 9), padding=((1, 0), (0, 1))"
        options = {"dilation_rate": (1, 9), "padding": ((1, 0), (0, 1))}
        yield function, options, ValueError, dilated
    for function in POOLINGS:
        name = "input_shape" if "grad" in function.__name__ else "x.shape"
        yield function, {"pool_size": 7}, ValueError, f"{name}=(2, 6, 7, 4), pool_size=(7, 7)"
        yield function, {"pool_size": (2, 8)}, ValueError, "pool_size=(2, 8)"
        yield function, {"pool_size": (2**16, 2**16)}, ValueError, "pool_size=(65536, 65536)"
        for padding in [((2, 0), (0, 0)), ((0, 2), (0, 0)), ((0, 0), (2, 0)), ((0, 0), (0, 9))]:
            received = f"padding={padding}, pool_size=(2, 2)"
            yield function, {"padding": padding}, ValueError, received

    # the mask of ReLU's gradient
    for function in GRADIENTS:
        relu = {"activation": "relu"}
        yield function, relu, ValueError, "output=None"
        received = "output.dtype=float64"
        yield function, {**relu, "output": Y.astype(np.float64)}, TypeError, received
        yield function, {**relu, "output": Y.tolist()}, TypeError, "output of type list"
        yield function, {**relu, "output": Y[:1]}, ValueError, f"output.shape={Y[:1].shape}"
        yield function, {**relu, "output": Y[0]}, ValueError, f"output.shape={Y[0].shape}"
        # Not read without ReLU, but a wrong one is a mistake all the same.
        yield function, {"output": Y[:1]}, ValueError, f"output.shape={Y[:1].shape}"

    # argmax
    yield fused_grad, {"argmax": TAPS.tolist()}, TypeError, "argmax of type list"
    yield fused_grad, {"argmax": None}, TypeError, "argmax of type NoneType"
    for dtype in (np.int32, np.int64, np.int8, np.float32, bool):
        received = f"argmax.dtype={np.dtype(dtype)}"
        yield fused_grad, {"argmax": TAPS.astype(dtype)}, TypeError, received
    for value in (4, 255):
        taps = TAPS.copy()
        taps[-1, -1, -1, -1] = value
        yield fused_grad, {"argmax": taps}, ValueError, f"argmax with value {value}"
    grad = max_pool2d_grad
    yield grad, {"argmax": ARGMAX.tolist()}, TypeError, "argmax of type list"
    yield grad, {"argmax": None}, TypeError, "argmax of type NoneType"
    for dtype in (np.int32, np.int64, np.int8, np.float32, bool):
        received = f"argmax.dtype={np.dtype(dtype)}"
        yield grad, {"argmax": ARGMAX.astype(dtype)}, TypeError, received
    yield grad, {"argmax": ARGMAX[:1]}, ValueError, f"argmax.shape={ARGMAX[:1].shape}"
    yield grad, {"argmax": ARGMAX[0]}, ValueError, f"argmax.shape={ARGMAX[0].shape}"
    for value in (4, 255):
        argmax = ARGMAX.copy()
        argmax[-1, -1, -1, -1] = value
        yield grad, {"argmax": argmax}, ValueError, f"argmax with value {value}"
    large = {
        "dy": np.ones((1, 1, 2, 1), np.float32),
        "input_shape": (1, 17, 18, 1),
        "pool_size": 17,
        "strides": 1,
    }
    wide = np.zeros((1, 1, 2, 1), np.int32)
    yield grad, {**large, "argmax": wide.astype(np.uint8)}, TypeError, "argmax.dtype=uint8"
    yield grad, {**large, "argmax": wide.astype(">i4")}, TypeError, "argmax.dtype=>i4"
    yield grad, {**large, "argmax": wide.astype(np.uint32)}, TypeError, "argmax.dtype=uint32"
    for value in (289, -1, 2**31 - 1, -(2**31)):
        argmax = wide.copy()
        argmax[0, 0, 1, 0] = value
        yield grad, {**large, "argmax": argmax}, ValueError, f"argmax with value {value}"

    # sizes whose products no 64-bit integer holds
    huge = (2**40, 2**20, 1, 1)
    one = np.ones((1, 1, 1, 1), np.float32)
    yield (
        conv2d,
        {"x": lazily((2**57, 1, 1, 1)), "w": one},
        ValueError,
        f"x.shape={(2**57, 1, 1, 1)}",
    )
    x, w = lazily((2**40, 1, 1, 1)), lazily((1, 1, 1, 2**30))
    yield conv2d, {"x": x, "w": w}, ValueError, f"y.shape={(2**40, 1, 1, 2**30)}"
    sides = ((2**31 - 1, 0), (2**31 - 1, 0))
    yield (
        conv2d,
        {"x": one, "w": one, "padding": sides},
        ValueError,
        f"y.shape={(1, 2**31, 2**31, 1)}",
    )
    for function in CONVOLVING:
        named = "input_shape" if function in (grad_input, explain) else "x.shape"
        wide = {"dilation_rate": 2**31 - 4, "padding": "same"}
        padded = (2, 2**32 - 2, 2**31 + 3, 4)
        yield function, wide, ValueError, f"padded {named}={padded}"
    yield grad_input, {"dy": one, "w": one, "input_shape": huge}, ValueError, f"input_shape={huge}"
    yield explain, {"input_shape": huge}, ValueError, f"input_shape={huge}"
    wrong = (1, 2**31, 2**31, 1)
    for function in (grad_filter, explain):
        yield function, {"filter_shape": wrong}, ValueError, f"filter_shape={wrong}"
    for function in (max_pool2d, avg_pool2d):
        long = (1, 2**31, 1, 1)
        yield function, {"x": lazily(long), "pool_size": 1}, ValueError, "pool_size=(1, 1)"
        sides = ((2**15 - 1, 2**15 - 1), (2**15 - 1, 2**15 - 1))
        spread = {"x": x, "pool_size": (2**15, 2**15), "strides": 1, "padding": sides}
        yield function, spread, ValueError, f"y.shape={(2**40, 2**15, 2**15, 1)}"
    for function in (max_pool2d_grad, avg_pool2d_grad):
        yield function, {"input_shape": huge}, ValueError, f"input_shape={huge}"
    # Products around 2**31, 2**32, 2**57 and 2**64 of every number of factors.
    for shape in [(2**16, 2**16, 2**16, 2**16), (2**31, 2**30, 1, 1), (2**62, 2, 2, 2)]:
        yield explain, {"input_shape": shape}, ValueError, f"input_shape={shape}"


def describe(value):
    if callable(value):
        return value.__name__
    if isinstance(value, dict):
        return "-".join(f"{name}={brief(item)}" for name, item in value.items())
    return ""


def brief(value):
    if isinstance(value, np.ndarray) and value.size > 4:
        return f"{value.dtype}{value.shape}"
    return repr(value)[:40]


@pytest.mark.parametrize(
    ("function", "wrong", "exception", "received"), list(table()), ids=describe
)
def test_wrong_argument(function, wrong, exception, received):
    with pytest.raises(exception, match=rf"\. Received: (.*, )?{re.escape(received)}\Z") as caught:
        function(**{**ACCEPTED[function], **wrong})
    assert type(caught.value) is exception
    assert str(caught.value).count("Received: ") == 1


@pytest.mark.parametrize("function", ACCEPTED, ids=describe)
def test_the_table_starts_from_what_is_accepted(function):
    with running_on():
        function(**ACCEPTED[function])


def is_public(function):
    return inspect.isfunction(function) or function is fastconv.PackedFilter


def test_the_table_has_every_public_function():
    """And each of its parameters."""
    public = {getattr(fastconv, name) for name in fastconv.__all__ if name not in WITHOUT_ARGUMENTS}
    assert public == {function for function in ACCEPTED if is_public(function)}
    for name in WITHOUT_ARGUMENTS - {"__version__"}:
        assert not inspect.signature(getattr(fastconv, name)).parameters
    rows = {(function, name) for function, wrong, _, _ in table() for name in wrong}
    for function in public:
        for name in inspect.signature(function).parameters:
            assert name in TRUTHS or (function, name) in rows, (function.__name__, name)


@pytest.mark.parametrize("name", sorted(WITHOUT_ARGUMENTS - {"__version__"}))
def test_functions_without_arguments(name):
    with pytest.raises(TypeError, match="takes 0 positional arguments"):
        getattr(fastconv, name)(1)


class Undecided:
    def __bool__(self):
        raise RuntimeError("neither true nor false")


@pytest.mark.parametrize("function", ACCEPTED, ids=describe)
def test_truths_are_any_object(function):
    if not is_public(function):
        return
    for name in TRUTHS & set(inspect.signature(function).parameters):
        for value in (0, 1, "", "no", [], None):
            function(**ACCEPTED[function], **{name: value})
        with pytest.raises(RuntimeError, match="neither"):
            function(**ACCEPTED[function], **{name: Undecided()})


@pytest.mark.parametrize("function", CONVOLUTIONS + FUSED_ONES + POOLINGS, ids=describe)
def test_options_are_keyword_only(function):
    with pytest.raises(TypeError, match="positional argument"):
        function(*ACCEPTED[function].values(), None, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        function(**ACCEPTED[function], stride=1)


@pytest.mark.parametrize("function", ACCEPTED, ids=describe)
def test_missing_argument(function):
    if not is_public(function) or function is fastconv.explain:
        return
    for name in ACCEPTED[function]:
        arguments = {key: value for key, value in ACCEPTED[function].items() if key != name}
        with pytest.raises(TypeError, match=rf"missing 1 required positional argument: '{name}'"):
            function(**arguments)


def test_what_fits_no_memory_is_a_memory_error():
    with pytest.raises(MemoryError):
        fastconv.conv2d(lazily((2**50, 1, 1, 1)), np.ones((1, 1, 1, 1), np.float32))


def test_refused_settings_change_nothing():
    before = fastconv.info()
    for threads in (0, 1025, True):
        with pytest.raises((TypeError, ValueError)):
            fastconv.set_num_threads(threads)
    with pytest.raises(ValueError, match="sse9"):
        _core.set_isa("sse9")
    assert fastconv.info() == before


@pytest.mark.parametrize(
    ("normalize", "value", "expected"),
    [
        (_arguments.normalize_pair, 3, (3, 3)),
        (_arguments.normalize_pair, [3, np.int16(4)], (3, 4)),
        (_arguments.normalize_shape, [1, 2, np.uint8(3), 0], (1, 2, 3, 0)),
        (_arguments.normalize_integer, np.int64(3), 3),
    ],
)
def test_normalized_integers(normalize, value, expected):
    normalized = normalize(value, "name")
    assert normalized == expected
    assert {type(item) for item in np.ravel(np.array(normalized, object))} == {int}


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("valid", ("valid", (0, 0, 0, 0))),
        ("SAME", ("same", (0, 0, 0, 0))),
        ([[1, np.int8(2)], (3, 4)], ("explicit", (1, 2, 3, 4))),
    ],
)
def test_normalized_padding(padding, expected):
    assert _arguments.normalize_padding(padding) == expected


def test_normalized_names():
    assert _arguments.normalize_activation(None) == "linear"
    assert _arguments.normalize_activation("relu") == "relu"
    assert _arguments.normalize_data_format("channels_first") == "channels_first"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.zeros((40, 3)), "<ndarray of shape (40, 3)>"),
        (np.array([1, 2]), "array([1, 2])"),
        (np.float32(2), repr(np.float32(2))),
        ("x" * 1000, "'" + "x" * 199 + "..."),
    ],
)
def test_messages_stay_short(value, shown):
    """An array in the wrong place would fill the screen."""
    with pytest.raises((TypeError, ValueError)) as error:
        _arguments.normalize_shape(value, "input_shape")
    assert str(error.value).endswith(f"Received: input_shape={shown}")
