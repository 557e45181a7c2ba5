"""Wrong arguments of the Keras layers: what becomes of each is what becomes of it in the stock layer.

The same exception with the same message, raised by the same step; or, where Keras and TensorFlow
take it, the same output. The functions' table is in test_errors.py, the commands' in
test_cli_errors.py.
"""

import inspect
import itertools
import json
import re
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastconv.keras
from fastconv.keras import accelerate, explain_layer, restore, summary

L = keras.layers


class StockConvPool2D(L.Conv2D):
    """What FastConvPool2D is to be like."""

    def call(self, inputs):
        return keras.ops.max_pool(super().call(inputs), 2, 2, data_format=self.data_format)

    def compute_output_shape(self, input_shape):
        batch, height, width, filters = super().compute_output_shape(input_shape)
        halves = [None if extent is None else extent // 2 for extent in (height, width)]
        return batch, *halves, filters


# Fast class, stock class, accepted arguments, accepted input shape.
PAIRS = {
    fast.__qualname__: (fast, stock, options, shape)
    for fast, stock, options, shape in [
        (fastconv.keras.FastConv1D, L.Conv1D, {"filters": 4, "kernel_size": 3}, (2, 9, 4)),
        (fastconv.keras.FastConv2D, L.Conv2D, {"filters": 4, "kernel_size": 3}, (2, 9, 8, 4)),
        (
            fastconv.keras.FastConvPool2D,
            StockConvPool2D,
            {"filters": 4, "kernel_size": 3},
            (2, 9, 8, 4),
        ),
        (
            fastconv.keras.FastConv1DTranspose,
            L.Conv1DTranspose,
            {"filters": 4, "kernel_size": 3},
            (2, 6, 4),
        ),
        (
            fastconv.keras.FastConv2DTranspose,
            L.Conv2DTranspose,
            {"filters": 4, "kernel_size": 3},
            (2, 5, 6, 4),
        ),
        (fastconv.keras.FastDepthwiseConv1D, L.DepthwiseConv1D, {"kernel_size": 3}, (2, 9, 4)),
        (fastconv.keras.FastDepthwiseConv2D, L.DepthwiseConv2D, {"kernel_size": 3}, (2, 9, 8, 4)),
        (
            fastconv.keras.FastSeparableConv1D,
            L.SeparableConv1D,
            {"filters": 4, "kernel_size": 3},
            (2, 9, 4),
        ),
        (
            fastconv.keras.FastSeparableConv2D,
            L.SeparableConv2D,
            {"filters": 4, "kernel_size": 3},
            (2, 9, 8, 4),
        ),
        (fastconv.keras.FastMaxPooling2D, L.MaxPooling2D, {}, (2, 9, 8, 4)),
        (fastconv.keras.FastAveragePooling2D, L.AveragePooling2D, {"pool_size": 2}, (2, 9, 8, 4)),
        (fastconv.keras.FastMaxPooling1D, L.MaxPooling1D, {}, (2, 9, 4)),
        (fastconv.keras.FastAveragePooling1D, L.AveragePooling1D, {"pool_size": 2}, (2, 9, 4)),
        (fastconv.keras.FastGlobalMaxPooling1D, L.GlobalMaxPooling1D, {}, (2, 9, 4)),
        (fastconv.keras.FastGlobalAveragePooling1D, L.GlobalAveragePooling1D, {}, (2, 9, 4)),
        (fastconv.keras.FastGlobalMaxPooling2D, L.GlobalMaxPooling2D, {}, (2, 9, 8, 4)),
        (fastconv.keras.FastGlobalAveragePooling2D, L.GlobalAveragePooling2D, {}, (2, 9, 8, 4)),
        (fastconv.keras.FastBatchNormalization, L.BatchNormalization, {}, (2, 9, 8, 4)),
        (fastconv.keras.FastActivation, L.Activation, {"activation": "relu"}, (2, 9, 8, 4)),
        (fastconv.keras.FastReLU, L.ReLU, {}, (2, 9, 8, 4)),
        (fastconv.keras.FastZeroPadding2D, L.ZeroPadding2D, {}, (2, 9, 8, 4)),
    ]
}

NOTHING = object()
INTEGERS = [0, -1, 2.5, 4.0, "3", "x", None, [3], (2, 2), True, {}, 2j, np.float32(4)]
PAIRS_OF_INTEGERS = [0, -1, 2.5, "22", "a", "", None, (), (1,), (1, 2, 3), (0, 1), (1, 0), (1, -1)]
PAIRS_OF_INTEGERS += [(1, 1.5), (2.0, 2.0), (1, "2"), (1, None), ((1, 1), (1, 1)), {1, 2}, {"a": 1}]
PAIRS_OF_INTEGERS += [True, (True, True), np.array([2.5, 1]), np.array([2, 2]), NOTHING, [2, 2]]
PADDINGS = ["full", "", None, 3, "causal", "Same", ["same"], ["same", "same"], ("same", "valid")]
PADDINGS += [((1, 1), (1, 1)), ((0, 0), (1, 1), (1, 1), (0, 0)), (1, 1), b"same"]
FORMATS = ["sideways", 3, "", ["channels_last"], b"channels_last", NOTHING]
CONFIG = {"class_name": "os.system", "config": {}}
FUNCTIONS = ["nonsense", 3, [1], NOTHING, CONFIG]
TRUTHS = [None, 0, 2, "no"]  # any object will do
TABLE = {
    "filters": INTEGERS,
    "kernel_size": PAIRS_OF_INTEGERS,
    "strides": PAIRS_OF_INTEGERS,
    "pool_size": PAIRS_OF_INTEGERS,
    "dilation_rate": PAIRS_OF_INTEGERS,
    "output_padding": PAIRS_OF_INTEGERS,
    "padding": PADDINGS,
    "data_format": FORMATS,
    "groups": INTEGERS,
    "depth_multiplier": INTEGERS,
    "activation": FUNCTIONS,
    **{
        f"{part}{kind}": FUNCTIONS
        for part in (
            *("kernel_", "bias_", "depthwise_", "pointwise_", "activity_"),
            *("beta_", "gamma_", "moving_mean_", "moving_variance_"),
        )
        for kind in ("initializer", "regularizer", "constraint")
    },
    "axis": [7, "x", None, 1.5, (1, 2)],
    **{
        name: ["a", [1], -1, None]
        for name in ("momentum", "epsilon", "negative_slope", "threshold")
    },
    "max_value": ["a", [1], -1],
    **dict.fromkeys(("center", "scale", "synchronized", "renorm"), TRUTHS),
    "use_bias": TRUTHS,
    "keepdims": TRUTHS,
    "lora_rank": [-1, 0, "a", 1.5, [1]],
    "lora_alpha": ["a", [1], 0],
    "name": [3, "a/b", [1]],
    "dtype": ["nonsense", 3, [1]],
    "trainable": TRUTHS,
    "autocast": TRUTHS,
    "nonsense": [1],
}
# Set by the layers themselves, or not theirs.
NOT_FOR_USERS = {"self", "args", "kwargs", "rank", "pool_mode", "pool_dimensions"}
NOT_FOR_USERS |= {"renorm_clipping", "renorm_momentum"}  # read only with renorm, in training


def parameters(stock):
    """Names of all arguments of a layer's constructor."""
    found = {"nonsense", "activity_regularizer"}
    for cls in stock.__mro__[:-1]:
        if cls is L.Layer:
            found |= {"name", "dtype", "trainable", "autocast"}
            break
        found |= set(inspect.signature(cls.__init__).parameters)
    return found - NOT_FOR_USERS


def test_the_tables_are_whole():
    wrappers = {name for name in fastconv.keras.__all__ if name.startswith("Fast")}
    # FastAdd has no arguments, and its inputs are two.
    assert set(PAIRS) == wrappers - {"FastAdd"}
    used = set()
    for _, stock, _, _ in PAIRS.values():
        # What base classes have and a layer does not hand on is an unknown argument to it.
        assert parameters(stock) <= set(TABLE)
        used |= parameters(stock)
    unused = {name for name in set(TABLE) - used if not name.startswith(("moving", "activity"))}
    assert unused <= {"renorm"}  # of newer versions of Keras than this may be


def outcome(cls, options, inputs, build=None):
    """How far it comes, and with what: ("making" or "calling", error), or ("output", tensor)."""
    keras.utils.set_random_seed(1)
    try:
        layer = cls(**options)
    except Exception as error:  # noqa: BLE001 - whichever it is
        return "making", error
    try:
        if build is not None:
            layer.build(build)
        with tf.GradientTape() as tape:
            outputs = layer(inputs)
        if not isinstance(outputs, keras.KerasTensor):
            tape.gradient(outputs, layer.trainable_variables)
    except Exception as error:  # noqa: BLE001
        return "calling", error
    return "output", outputs


def message(error):
    """Without numbers of layers, addresses of objects, and the name of our helper."""
    text = re.sub(r"0x[0-9a-f]+|(?<=[a-z0-9])_\d+\b", "", str(error))
    text = text.replace("\n  • training=None", "")
    for ours in ("StockConvPool2D", "FastConvPool2D", "stock_conv_pool2d", "fast_conv_pool2d"):
        text = text.replace(ours, "ConvPool2D")
    return text


def dense(output):
    if isinstance(output, tf.RaggedTensor):
        return output.to_tensor()
    return tf.sparse.to_dense(output) if isinstance(output, tf.SparseTensor) else output


def assert_same(fast, stock):
    assert fast[0] == stock[0], (fast, stock)
    if fast[0] == "output":
        assert (fast[1].shape, fast[1].dtype) == (stock[1].shape, stock[1].dtype)
        if fast[1].dtype == tf.string:
            np.testing.assert_array_equal(fast[1], stock[1])
        elif not isinstance(fast[1], keras.KerasTensor):
            np.testing.assert_allclose(dense(fast[1]), dense(stock[1]), rtol=1e-4, atol=1e-4)
        return
    assert type(fast[1]) is type(stock[1]), (fast, stock)
    assert message(fast[1]) == message(stock[1])


ROWS = [
    pytest.param(kind, name, id=f"{kind} {name}")
    for kind, (_, stock, _, _) in PAIRS.items()
    for name in sorted(parameters(stock))
]


@pytest.mark.parametrize("kind, name", ROWS)
def test_wrong_argument(kind, name):
    fast, stock, options, shape = PAIRS[kind]
    inputs = tf.constant(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    refused = 0
    for value in TABLE[name]:
        wrong = {**options, name: value}
        if name == "lora_alpha":
            wrong["lora_rank"] = 2
        result = outcome(fast, wrong, inputs)
        assert_same(result, outcome(stock, wrong, inputs))
        refused += result[0] != "output"
    assert refused or TABLE[name] is TRUTHS


def test_arguments_that_do_not_fit_one_another():
    for kind, wrong in [
        ("FastConv2D", {"strides": 2, "dilation_rate": 2}),
        ("FastConv2D", {"filters": 4, "groups": 3}),
        ("FastConv2D", {"filters": 3, "groups": 3}),
        ("FastConv2D", {"kernel_size": 10}),
        ("FastConv2D", {"kernel_size": 5, "dilation_rate": 3}),
        ("FastConv1D", {"strides": 2, "dilation_rate": 2}),
        ("FastConv1D", {"kernel_size": 10}),
        ("FastConvPool2D", {"kernel_size": (9, 8)}),
        ("FastConvPool2D", {"kernel_size": (8, 8)}),
        ("FastConv2DTranspose", {"strides": 2, "dilation_rate": 2}),
        ("FastConv2DTranspose", {"strides": 2, "output_padding": 2}),
        ("FastConv2DTranspose", {"strides": 2, "output_padding": 3}),
        ("FastDepthwiseConv2D", {"strides": (1, 2)}),
        ("FastDepthwiseConv2D", {"kernel_size": 10}),
        ("FastDepthwiseConv1D", {"kernel_size": 10}),
        ("FastSeparableConv1D", {"kernel_size": 10}),
        ("FastSeparableConv1D", {"strides": 2, "dilation_rate": 2}),
        ("FastSeparableConv2D", {"kernel_size": 10}),
        ("FastSeparableConv2D", {"strides": 2, "dilation_rate": 2}),
        ("FastMaxPooling2D", {"pool_size": 10}),
        ("FastMaxPooling2D", {"pool_size": 2, "strides": (0, 2)}),
        ("FastMaxPooling1D", {"pool_size": 10}),
        ("FastMaxPooling1D", {"pool_size": 2, "strides": 0}),
        ("FastAveragePooling1D", {"pool_size": 10}),
        ("FastAveragePooling2D", {"pool_size": 10}),
        ("FastAveragePooling2D", {"pool_size": 2, "strides": (0, 2)}),
    ]:
        fast, stock, options, shape = PAIRS[kind]
        inputs = tf.ones(shape)
        wrong = {**options, **wrong}
        assert_same(outcome(fast, wrong, inputs), outcome(stock, wrong, inputs))


def wrong_inputs(shape):
    rank = len(shape)
    ones = tf.ones(shape)
    for other in range(rank):
        yield f"rank {other}", tf.zeros(shape[:other])
    yield "a rank more", tf.zeros((*shape, 1))
    yield "two ranks more", tf.zeros((*shape, 1, 1))
    yield "another number of channels", tf.zeros((*shape[:-1], 5))
    yield "no channels", tf.zeros((*shape[:-1], 0))
    yield "no pixels", tf.zeros((2, *[0] * (rank - 2), 4))
    yield "a single pixel", tf.zeros((2, *[1] * (rank - 2), 4))
    for dtype in ("int32", "uint8", "bool", "string", "complex64", "float64", "float16"):
        yield dtype, tf.zeros(shape, dtype)
    yield "an array of float64", np.zeros(shape)
    yield "an array of objects", np.zeros(shape, object)
    for value in (None, 3, "text", [1, 2], {}, [ones, ones], NOTHING):
        yield f"{type(value).__name__}", value
    yield "sparse", tf.sparse.from_dense(ones)
    yield "ragged", tf.RaggedTensor.from_tensor(ones)
    yield "symbolic", keras.KerasTensor((None,) * (rank - 1) + (4,))
    yield "symbolic, of a wrong rank", keras.KerasTensor((None, 4))
    yield "symbolic, channels unknown", keras.KerasTensor((None,) * rank)
    yield "symbolic, too small", keras.KerasTensor((None, *[1] * (rank - 2), 4))


@pytest.mark.parametrize("built", [False, True], ids=["new", "built"])
@pytest.mark.parametrize("kind", PAIRS)
def test_wrong_input(kind, built):
    fast, stock, options, shape = PAIRS[kind]
    for _, inputs in wrong_inputs(shape):
        build = shape if built else None
        assert_same(outcome(fast, options, inputs, build), outcome(stock, options, inputs, build))


@pytest.mark.parametrize("kind", PAIRS)
def test_call_without_or_with_more_than_its_input(kind):
    fast, stock, options, shape = PAIRS[kind]
    for arguments, words in [((), {}), ((tf.ones(shape),) * 3, {}), ((tf.ones(shape),), {"a": 1})]:
        errors = []
        for cls in (fast, stock):
            layer = cls(**options)
            layer.build(shape)
            with pytest.raises((TypeError, ValueError)) as caught:
                layer(*arguments, **words)
            errors.append(caught.value)
        assert type(errors[0]) is type(errors[1])


# --- functions on models --------------------------------------------------------------------------

NO_MODELS = [None, 3, "model", [], {}, keras.Model, L.Conv2D, len, tf.ones((1, 2)), NOTHING]


@pytest.mark.parametrize("function", [accelerate, restore, summary, explain_layer])
def test_what_is_no_model(function):
    name = "layer` must be a Keras layer" if function is explain_layer else "model` must be a Keras"
    for value in [*NO_MODELS, [L.Dense(1)], tf.Module()]:
        with pytest.raises(TypeError, match=name) as caught:
            function(value)
        assert f"Received: {name.partition('`')[0]}={value!r}" in str(caught.value)
    with pytest.raises(TypeError, match="missing 1 required"):
        function()
    with pytest.raises(TypeError, match="unexpected keyword"):
        function(keras.Sequential(), nonsense=1)


def test_what_is_no_console():
    for value in [3, "console", [], NOTHING]:
        with pytest.raises(
            TypeError, match=r"`console` must be a rich\.console\.Console\. Received"
        ):
            summary(keras.Sequential(), console=value)


# --- configurations -------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="test_keras_errors")
class Registered(L.Conv2D):
    """What Keras makes of any class that is registered with it."""


def model_of(convolution, pooling):
    return keras.Sequential([L.Input((9, 8, 4)), convolution(4, 3, name="c"), pooling(2, name="p")])


MODELS = {
    "fast": (fastconv.keras.FastConv2D, fastconv.keras.FastMaxPooling2D),
    "stock": (L.Conv2D, L.MaxPooling2D),
    "registered": (Registered, L.MaxPooling2D),
}
DANGEROUS = ["os.system", "system", "eval", "exec", "Lambda", "Model", "Conv2D", "get_file"]
MODULES = ["os", "subprocess", "builtins", "keras.utils", "keras.src.utils.file_utils", "fastconv"]
VALUES = {
    "c": {"filters": [0, -4, "many", 2.5, None], "kernel_size": [[0, 3], [3], "33", [-3, 3]]},
    "p": {"pool_size": [[2, 0], [0, 2], [-2, 2], [2], "ab", 0], "padding": ["full", 3, None]},
}
VALUES["c"] |= {"padding": ["full", 3], "strides": [0, [1, 0], [2.0, 2.0]], "groups": [0, 3]}
VALUES["c"] |= {"data_format": ["sideways"], "activation": ["os.system", CONFIG], "nonsense": [1]}
VALUES["p"] |= {"strides": [[-1, 1], [2, 0], "a", [2.0, 2.0]], "data_format": ["sideways"]}


def load_changed(directory, kind, change):
    """The model of a .keras file of which `change` was made to the layers' entries; or the error."""
    path = directory / f"{kind}.keras"
    if not path.exists():
        model_of(*MODELS[kind]).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    entries = {entry["config"]["name"]: entry for entry in config["config"]["layers"]}
    change(entries)
    members["config.json"] = json.dumps(config).encode()
    changed = directory / "changed.keras"
    with zipfile.ZipFile(changed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    try:
        return keras.models.load_model(changed)
    except Exception as error:  # noqa: BLE001
        return error


def test_configurations_with_wrong_values(tmp_path):
    """What Keras refuses in a stock layer's configuration it refuses in ours."""
    refused = 0
    for layer, values in VALUES.items():
        for name, value in itertools.chain.from_iterable(
            [(name, value) for value in wrong] for name, wrong in values.items()
        ):

            def change(entries, layer=layer, name=name, value=value):
                entries[layer]["config"][name] = value

            fast = load_changed(tmp_path, "fast", change)
            stock = load_changed(tmp_path, "stock", change)
            assert type(fast) is type(stock), (name, value, fast, stock)
            refused += isinstance(fast, Exception)
    assert refused >= 25


@pytest.mark.parametrize("key", ["class_name", "module", "registered_name"])
def test_configurations_that_name_something_else(key, tmp_path):
    """Nothing but a layer is made, and nothing that another registered class would not be.

    Keras looks a class up by its registered name alone; then it does not read the two other names.
    """
    for value in [*DANGEROUS, *MODULES, None, 3, "", "fastconv>Conv9D"]:

        def change(entries, value=value):
            entries["c"][key] = value

        fast = load_changed(tmp_path, "fast", change)
        registered = load_changed(tmp_path, "registered", change)
        assert isinstance(fast, Exception) == isinstance(registered, Exception), (value, fast)
        if isinstance(fast, Exception):
            assert key == "registered_name"
            assert re.search(r"\w+ \w+", str(fast))
        else:
            assert type(fast.layers[0]) is fastconv.keras.FastConv2D
