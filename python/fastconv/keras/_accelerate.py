"""Making whole models fast, and stock again: accelerate(), restore(), summary() and patch()."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import keras
from rich.console import Console
from rich.table import Table

from fastconv._arguments import shown
from fastconv.keras._explain import explain_layer
from fastconv.keras._joining import joins
from fastconv.keras._stand_in import JOINING, STAND_INS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastconv.keras._explain import Explanation

Model = TypeVar("Model", bound=keras.layers.Layer)


def accelerate(model: Model) -> Model:
    """Makes every layer of ``model`` that fastconv has a fast layer for that fast layer.

    The layers change their class and nothing else, so ``model`` keeps its weights, its optimizer's
    state, what ``compile()`` was told and who shares which layer. It may be functional, Sequential,
    subclassed or nested, built or not, trained or not. ``summary(model)`` tells what was done.

    With TensorFlow, batch normalisations, sums of two and ReLUs behind a convolution of a functional
    model, whose output nothing else reads, become part of it where a graph is made for inference. In
    training, batch normalisations are computed in fewer passes, and sums and ReLUs behind them become
    part of these. Results differ from the stock layers' by rounding.

    Functions that you traced from the model yourself (``tf.function``) remain what they are; those
    of ``fit()``, ``evaluate()`` and ``predict()`` are made anew.

    Args:
        model: a Keras model, or a layer.

    Returns:
        ``model``, which was changed in place.

    Raises:
        TypeError: if it is neither.
    """
    _change_classes(model, STAND_INS)
    for part in _layers(model):
        if isinstance(part, keras.Model):
            # In the order of the graph: one joins the next.
            for layer in part.layers:
                if type(layer) in JOINING and joins(layer):
                    _change_class(layer, JOINING[type(layer)])
    return model


def restore(model: Model) -> Model:
    """Makes every fast layer of ``model`` the stock layer it stands in for: undoes accelerate().

    Layers that there are no stock ones for remain: those that compute in int8 (``FastConv2D.quantize``),
    and ``FastConvPool2D``.

    Args:
        model: a Keras model, or a layer.

    Returns:
        ``model``, which was changed in place.

    Raises:
        TypeError: if it is neither.
    """
    classes = {**STAND_INS, **JOINING}
    return _change_classes(model, {fast: stock for stock, fast in classes.items()})


def summary(model: keras.layers.Layer, console: Console | None = None) -> list[Explanation]:
    """Prints a table of ``model``'s layers: who computes each, and why.

    Args:
        model: a Keras model, or a layer.
        console: the ``rich.console.Console`` to print to; by default, standard output.

    Returns:
        The list of Explanations that the table shows.

    Raises:
        TypeError: if ``model`` is no Keras model or layer, or ``console`` no console.
    """
    if console is not None and not callable(getattr(console, "print", None)):
        raise TypeError(
            f"`console` must be a rich.console.Console. Received: console={shown(console)}"
        )
    explanations = [
        explain_layer(layer)
        for layer in _layers(model)
        if not isinstance(layer, (keras.Model, keras.layers.InputLayer))
    ]
    served = sum(explanation.served_by == "fastconv" for explanation in explanations)
    name = getattr(model, "name", "")
    table = Table(title=f"{name}: {served} of {len(explanations)} layers on fastconv's kernels")
    for heading in ("layer", "class", "computed by", "why"):
        table.add_column(heading)
    for explanation in explanations:
        table.add_row(
            explanation.name,
            explanation.type,
            explanation.served_by,
            explanation.reason,
            style=None if explanation.served_by == "fastconv" else "dim",
        )
    (console or Console()).print(table)
    return explanations


_patch_lock = threading.Lock()
_patches = 0  # how many are active


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Context manager within which the stock classes make fast layers.

    For code that one cannot edit: whoever calls ``keras.layers.Conv2D(...)`` within it, under
    whatever name it was imported, gets a ``FastConv2D``. So does the loading of a model's file.
    Subclasses of the stock classes stay what they are. It holds for all threads of the process.
    """
    global _patches
    with _patch_lock:
        _patches += 1
        if _patches == 1:
            for stock, fast in STAND_INS.items():
                stock.__new__ = _maker(stock, fast)
    try:
        yield
    finally:
        with _patch_lock:
            _patches -= 1
            if _patches == 0:
                for stock in STAND_INS:
                    del stock.__new__


def _maker(stock: type[Any], fast: type[Any]) -> Callable[..., Any]:
    def __new__(cls: type[Any], *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        # Python then calls __init__ of the class that this made, a subclass of `stock`.
        cls = fast if cls is stock else cls
        return super(stock, cls).__new__(cls, *args, **kwargs)

    return __new__


def _layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """``model`` and all layers within, each once."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: model={shown(model)}")
    unique = {id(layer): layer for layer in model._flatten_layers()}
    return list(unique.values())


def _change_classes(model: Model, classes: dict[type[Any], type[Any]]) -> Model:
    layers = _layers(model)
    for layer in layers:
        # Quantised or to be: no stock layer of these classes computes so.
        if type(layer) in classes and layer.quantization_mode is None:
            _change_class(layer, classes[type(layer)])
    for layer in layers:
        if isinstance(layer, keras.Model):
            _forget_traced_functions(layer)
    return model


def _change_class(layer: keras.layers.Layer, cls: Any) -> None:
    # Not by Keras's __setattr__, which looks for variables in what it sets.
    # What Keras notes in each layer of the parameters of call() stays true: they are the stock layer's.
    object.__setattr__(layer, "__class__", cls)
    layer.__dict__["quantize"] = _quantize_of(layer, cls)


def _quantize_of(layer: keras.layers.Layer, cls: Any) -> Callable[..., None]:
    """What Keras makes of a class's quantize() where a layer is made: it stays that of the first class."""

    @functools.wraps(cls.quantize)
    def quantize(mode: Any = None, config: Any = None, **options: Any) -> None:
        mode = config.mode if mode is None and config is not None else mode
        layer._check_quantize_args(mode, layer.compute_dtype)
        if config is not None:  # which Keras did not always have
            options["config"] = config
        layer._tracker.unlock()
        try:
            cls.quantize(layer, mode, **options)
        finally:
            layer._tracker.lock()

    return quantize


def _forget_traced_functions(model: keras.Model) -> None:
    model.train_function = model.test_function = model.predict_function = None
    config = getattr(model, "_compile_config", None)
    if model.compiled and config is not None:
        # Keras drops what was asked for where a layer does not support it, and says so; but not
        # where it is set to what it is already.
        model.jit_compile = False
        model.jit_compile = config.config.get("jit_compile")
