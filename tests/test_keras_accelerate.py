"""accelerate(), restore(), summary(), explain_layer() and patch() on models of every kind."""

import copy
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.layers import Conv2D as ImportedConv2D
from rich.console import Console

import fastconv
from fastconv.adapters import xla
from fastconv.keras import (
    FastConv2D,
    FastDepthwiseConv2D,
    FastMaxPooling2D,
    accelerate,
    explain_layer,
    patch,
    restore,
    summary,
)
from tensorflow_oracle import assert_all_close

L = keras.layers


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    labels = np.eye(4, dtype="float32")[rng.integers(4, size=32)]
    return rng.random((32, 12, 12, 2), "float32"), labels


# --- models of every kind -------------------------------------------------------------------------


def sequential():
    return keras.Sequential(
        [
            keras.Input((12, 12, 2)),
            L.Conv2D(4, 3, activation="relu"),
            L.MaxPooling2D(),
            L.Flatten(),
            L.Dense(4, "softmax"),
        ]
    )


def functional_with_shared_and_nested():
    block_input = keras.Input((12, 12, 4))
    x = L.Conv2D(4, 3, padding="same", activation="relu")(block_input)
    block = keras.Model(block_input, L.DepthwiseConv2D(3, padding="same")(x), name="block")
    inputs = keras.Input((12, 12, 2))
    x = L.Conv2D(4, 3, padding="same")(inputs)
    shared = L.Conv2D(4, 1, activation="relu", name="shared")
    x = L.Add()([shared(block(x)), shared(x)])
    x = L.MaxPooling2D(3, strides=2, padding="same")(L.SeparableConv2D(4, 3)(x))
    return keras.Model(inputs, L.Dense(4, "softmax")(L.Flatten()(x)))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.stages = [L.Conv2D(4, 3, activation="relu"), L.Conv2D(3, 3, strides=2)]
        self.heads = {"pool": L.MaxPooling2D(), "dense": L.Dense(4, "softmax")}

    def call(self, inputs):
        x = inputs
        for stage in self.stages:
            x = stage(x)
        x = self.heads["pool"](x)
        return self.heads["dense"](L.Flatten()(x))


def wrapped():
    inputs = keras.Input((12, 12, 2))
    x = L.Reshape((1, 12, 12, 2))(inputs)
    x = L.TimeDistributed(L.Conv2D(4, 3, activation="relu"))(x)
    x = L.TimeDistributed(L.MaxPooling2D())(x)
    return keras.Model(inputs, L.Dense(4, "softmax")(L.Flatten()(x)))


MODELS = [sequential, functional_with_shared_and_nested, Subclassed, wrapped]


def make(model, data, optimizer="adam", **options):
    keras.utils.set_random_seed(3)
    made = model()
    made(data[0][:1])
    made.compile(optimizer, "categorical_crossentropy", **options)
    return made


def train(model, data):
    return model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]


def predictions(model, data):
    return model.predict(data[0], verbose=0)


def kinds(model):
    return [type(layer).__qualname__ for layer in model._flatten_layers()]


def fast_layers(model):
    return [kind for kind in kinds(model) if kind.startswith("Fast")]


@pytest.mark.parametrize(
    "model, trained", [(sequential, False), *[(model, True) for model in MODELS]]
)
def test_there_and_back(model, trained, data, executed):
    ours, theirs = make(model, data), make(model, data)
    if trained:
        assert train(ours, data) == train(theirs, data)
    before, variables = kinds(ours), ours.variables + ours.optimizer.variables
    outputs = predictions(ours, data)
    assert executed() == {}

    assert accelerate(ours) is ours
    assert fast_layers(ours)
    assert not {"Conv2D", "MaxPooling2D", "DepthwiseConv2D"} & set(kinds(ours))
    assert [id(v) for v in variables] == [id(v) for v in ours.variables + ours.optimizer.variables]
    assert_all_close([predictions(ours, data)], [outputs], 1e-5)
    assert executed().keys() & {"FastconvConv2D", "FastconvConv2DMaxPool2D"}
    # The optimizer goes on where it was, and so do the weights.
    np.testing.assert_allclose(train(ours, data), train(theirs, data), rtol=1e-4)
    apart, in_one = (
        [executed().get(op, 0) for op in ops]
        for ops in (
            ("FastconvMaxPool2DWithArgmax", "FastconvMaxPool2DGrad"),
            ("FastconvConv2DMaxPool2D", "FastconvConv2DMaxPool2DGrad"),
        )
    )
    assert apart[0] == apart[1]
    assert apart[1] + in_one[1] > 0

    theirs.set_weights(ours.get_weights())
    assert restore(ours) is ours
    assert kinds(ours) == before
    np.testing.assert_array_equal(predictions(ours, data), predictions(theirs, data))
    counts = executed()
    train(ours, data)
    assert executed() == counts


def test_it_is_idempotent_and_takes_layers(draw, executed):
    layer = L.Conv2D(3, 3)
    x = draw(1, 6, 6, 2)
    wanted = layer(x)
    for _ in range(2):
        assert type(fastconv.accelerate(layer)) is FastConv2D
    assert_all_close([layer(x)], [wanted], 1e-5)
    assert executed() == {"FastconvConv2D": 1}
    for _ in range(2):
        assert type(fastconv.restore(layer)) is L.Conv2D
    np.testing.assert_array_equal(layer(x), wanted)
    assert type(restore(FastConv2D(3, 3))) is L.Conv2D
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"must be a Keras model or layer. Received: model=3"):
            function(3)


def test_layers_that_are_not_built_yet(draw):
    x = draw(1, 6, 6, 2)
    layer = accelerate(L.Conv2D(3, 3, name="layer"))
    assert layer(x).shape == (1, 4, 4, 3)
    assert [weight.path for weight in layer.weights] == ["layer/kernel", "layer/bias"]
    pool = restore(FastMaxPooling2D())
    assert pool(x).shape == (1, 3, 3, 2)


def test_default_names_are_not_used_up():
    layer = L.Conv2D(3, 3)
    number = int(layer.name.rpartition("_")[2]) if "_" in layer.name else 0
    accelerate(layer)
    assert L.Conv2D(3, 3).name == f"conv2d_{number + 1}"


class OwnConv2D(L.Conv2D):
    def call(self, inputs):
        return super().call(inputs) + 1.0


def test_subclasses_with_code_of_their_own_are_left_alone():
    model = accelerate(keras.Sequential([keras.Input((6, 6, 1)), OwnConv2D(2, 3), L.Conv2D(2, 3)]))
    assert [type(layer) for layer in model.layers] == [OwnConv2D, FastConv2D]
    assert "own code is left alone" in explain_layer(model.layers[0]).reason


def test_what_compile_was_told_of_xla_is_kept(data, executed_in_xla, monkeypatch):
    model = make(sequential, data, "sgd", jit_compile=True)
    accelerate(model)
    assert model.jit_compile
    train(model, data)
    assert executed_in_xla()["FastconvConv2DMaxPool2DGrad"] == 8
    restore(model)
    # Where the kernels cannot run inside XLA, a fast model runs outside, and says so.
    monkeypatch.setattr(xla, "reason_unavailable", lambda: "this test says so")
    with pytest.warns(UserWarning, match="jit_compile"):
        accelerate(model)
    assert not model.jit_compile
    restore(model)
    assert model.jit_compile


def test_copies_of_an_accelerated_model(data):
    model = accelerate(make(sequential, data))
    twin = copy.deepcopy(model)
    assert kinds(twin) == kinds(model)
    np.testing.assert_array_equal(predictions(twin, data), predictions(model, data))
    clone = keras.models.clone_model(model)
    assert kinds(clone) == kinds(model)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("model", MODELS)
def test_weights_move_both_ways(model, data, tmp_path):
    stock, fast = make(model, data), accelerate(make(model, data))
    for one, other in [(stock, fast), (fast, stock)]:
        train(one, data)
        one.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
        for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("model", [sequential, functional_with_shared_and_nested])
def test_keras_files_both_ways(model, data, tmp_path):
    fast = accelerate(make(model, data))
    train(fast, data)
    fast.save(tmp_path / "fast.keras")
    loaded = keras.models.load_model(tmp_path / "fast.keras")
    assert fast_layers(loaded) == fast_layers(fast)
    np.testing.assert_array_equal(predictions(loaded, data), predictions(fast, data))
    stock = restore(loaded)
    stock.save(tmp_path / "stock.keras")
    assert not fast_layers(keras.models.load_model(tmp_path / "stock.keras"))
    with patch():
        again = keras.models.load_model(tmp_path / "stock.keras")
    assert sorted(fast_layers(again)) == sorted(fast_layers(fast))
    np.testing.assert_array_equal(predictions(again, data), predictions(fast, data))


def test_exported_models(data, tmp_path):
    model = accelerate(make(functional_with_shared_and_nested, data))
    model.export(tmp_path / "fast", verbose=False)
    assert b"FastconvConv2D" in (tmp_path / "fast" / "saved_model.pb").read_bytes()
    loaded = tf.saved_model.load(tmp_path / "fast")
    np.testing.assert_allclose(loaded.serve(data[0]), predictions(model, data), rtol=1e-6)
    restore(model).export(tmp_path / "stock", verbose=False)
    assert b"Fastconv" not in (tmp_path / "stock" / "saved_model.pb").read_bytes()


# --- telling --------------------------------------------------------------------------------------


def test_summary():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            L.Conv2D(4, 3, activation="relu"),
            L.DepthwiseConv2D(3, use_bias=False),
            L.Conv2D(4, 3, dtype="float64"),
            L.Flatten(),
        ],
        name="net",
    )
    output = io.StringIO()
    told = summary(model, Console(file=output, width=150))
    assert [explanation.served_by for explanation in told] == ["stock"] * 4
    assert "accelerate() would make it a FastConv2D" in output.getvalue()
    accelerate(model)
    output = io.StringIO()
    told = summary(model, Console(file=output, width=150))
    assert "net: 2 of 4 layers" in output.getvalue()
    assert [explanation.served_by for explanation in told] == ["fastconv"] * 2 + ["stock"] * 2
    assert [explanation.type for explanation in told] == [
        "FastConv2D",
        "FastDepthwiseConv2D",
        "FastConv2D",
        "Flatten",
    ]
    reasons = [explanation.reason for explanation in told]
    assert reasons[0] == "float32 on the CPU; bias and relu in the kernel"
    assert reasons[1] == "float32 on the CPU"
    assert reasons[2] == (
        "the data type is not float32, float16 or bfloat16: the layer computes in float64"
    )
    assert reasons[3] == "fastconv has no layer for Flatten"


def test_explain_layer(draw):
    layer = FastConv2D(3, 3, name="layer")
    assert fastconv.explain(layer) == explain_layer(layer)
    assert str(explain_layer(layer)) == (
        "FastConv2D 'layer' is computed by fastconv: float32 on the CPU; bias in the kernel"
    )
    layer.build((None, 6, 6, 1))
    layer(draw(1, 2, 6, 1))
    assert "the stock code served, since the output would be empty" in explain_layer(layer).reason
    with pytest.raises(TypeError, match=r"must be a Keras layer. Received: layer='layer'"):
        explain_layer("layer")


# --- patch() --------------------------------------------------------------------------------------


def test_patch(draw, executed):
    x = draw(1, 6, 6, 2)
    with patch():
        layer = ImportedConv2D(3, 3, name="layer")
        layer(x)
        assert executed() == {"FastconvConv2D": 1}
        kinds = [
            type(made)
            for made in (
                layer,
                L.Conv2D(filters=3, kernel_size=3),
                tf.keras.layers.DepthwiseConv2D(3),
                L.MaxPool2D(),
                L.Conv2D.from_config(layer.get_config()),
                FastConv2D(3, 3),
                OwnConv2D(3, 3),
                L.Conv3D(3, 3),
            )
        ]
    assert kinds == [
        *(FastConv2D, FastConv2D, FastDepthwiseConv2D, FastMaxPooling2D, FastConv2D, FastConv2D),
        *(OwnConv2D, L.Conv3D),
    ]
    assert type(L.Conv2D(3, 3)) is L.Conv2D
    assert type(FastConv2D(3, 3)) is FastConv2D


def test_patches_nest_and_end_with_errors():
    with patch():
        with pytest.raises(ValueError, match="kernel_size"), patch():
            L.Conv2D(3, 0)
        assert type(L.Conv2D(3, 3)) is FastConv2D
    assert type(L.Conv2D(3, 3)) is L.Conv2D


def test_restore_before_building():
    """Keras binds build() where a layer is made, as one of the class that it then has."""
    model = keras.Sequential([FastConv2D(4, 3)])
    fastconv.restore(model)
    x = tf.ones((2, 6, 6, 3))
    assert model(x).shape == (2, 4, 4, 4)
    assert type(model.layers[0]) is ImportedConv2D
    assert model.layers[0].kernel.shape == (3, 3, 3, 4)
    fastconv.accelerate(model)
    assert type(model.layers[0]) is FastConv2D
    assert model(x).shape == (2, 4, 4, 4)
