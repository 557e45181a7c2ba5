"""Convolution layers that quantize("int8") makes compute in int8, as Keras's Dense does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._convolution import activated, epilogue, geometry, reason_for_stock_code
from fastconv.keras._stand_in import adapter, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from keras.layers import Conv2D as _Layer

    from fastconv.keras._stand_in import Tensor
else:
    _Layer = object  # what the mixin is mixed into

_EPSILON = 1e-7  # of keras.quantizers.AbsMaxQuantizer, as of the kernels


class QuantizesToInt8(_Layer):
    """Mixin of ``FastConv2D``: quantisation to int8, for inference."""

    dtype_policy: Any  # a property of Keras's

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Makes the layer compute in int8, for inference; ``model.quantize("int8")`` calls it.

        The kernel becomes int8 with a scale for each filter (``kernel_scale``), as
        ``keras.quantizers.AbsMaxQuantizer(axis=(0, 1, 2))`` makes it of the kernel that there is, and the
        dtype policy ``"int8_from_float32"``. Inputs are quantised by an ``AbsMaxQuantizer`` as well,
        each image by itself, when the layer is called. The bias can still be trained.

        With the TensorFlow backend :func:`fastconv.conv2d_int8` computes, XLA or not. With another one,
        on a GPU, or in a dtype policy that does not compute in float32, Keras's operations do, on whole
        numbers in float32: no faster than a layer that is not quantised, and the same but for rounding
        of sums beyond 2**24.

        Args:
            mode: ``"int8"``.
            type_check: whether only a ``FastConv2D`` itself, and no subclass, is taken.
            config: None, or a ``keras.quantizers.Int8QuantizationConfig`` with its defaults.

        Raises:
            NotImplementedError: for any other mode or configuration, with LoRA enabled, and for a subclass
                unless ``type_check=False``.
            ValueError: if the layer is not built, or quantised already.
        """
        from fastconv.keras.conv2d import FastConv2D

        overridden = type(self).convolution_op is not FastConv2D.convolution_op
        if overridden or (type_check and type(self) is not FastConv2D):
            raise self._not_implemented_error(self.quantize)
        if mode != "int8":
            raise self._quantization_mode_error(mode)
        if not _has_defaults(config):
            raise NotImplementedError(
                "`config` must be None or an Int8QuantizationConfig with its defaults: "
                f"convolutions are quantised by AbsMaxQuantizer. Received: config={config!r}"
            )
        if self.lora_enabled:
            raise NotImplementedError(
                "A convolution with LoRA cannot be quantised. Received: "
                f"lora_rank={self.lora_rank} of layer '{self.name}'"
            )
        kernel, scale = keras.quantizers.abs_max_quantize(
            self._kernel, axis=(0, 1, 2), to_numpy=True
        )
        shape = self._kernel.shape
        del self._kernel
        self.quantized_build(shape, mode)
        self._kernel.assign(kernel)
        self.kernel_scale.assign(keras.ops.reshape(scale, (-1,)))
        if self.dtype_policy.quantization_mode is None:
            self.dtype_policy = keras.dtype_policies.get(f"int8_from_{self.dtype_policy.name}")

    def build(self, input_shape: Sequence[int | None]) -> None:
        # Keras binds a layer's build() where the layer is made; restore() changes its class behind that.
        if not isinstance(self, QuantizesToInt8):
            type(self).build(self, input_shape)
            return
        super().build(input_shape)
        mode = self.quantization_mode
        if mode is not None:  # of a file: what was built is not what will be loaded
            shape = self._kernel.shape
            del self._kernel
            self.quantized_build(shape, mode)

    def quantized_build(self, kernel_shape: Sequence[int], mode: str) -> None:
        if mode != "int8":
            raise self._quantization_mode_error(mode)
        self._kernel = self.add_weight(
            name="kernel", shape=kernel_shape, initializer="zeros", dtype="int8", trainable=False
        )
        self.kernel_scale = self.add_weight(
            name="kernel_scale", shape=(self.filters,), initializer="ones", trainable=False
        )
        self._is_quantized = True

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_mode is not None:
            raise NotImplementedError(
                "LoRA cannot be enabled on a quantised convolution. Received: "
                f"layer '{self.name}' of dtype policy '{self.dtype_policy.name}'"
            )
        super().enable_lora(*args, **kwargs)

    def _int8_call(self, inputs: Tensor) -> Tensor:
        reason = reason_for_stock_code(self, inputs)
        if reason is None and self.compute_dtype != "float32":
            reason = f"the kernels of int8 stand between float32: {self.compute_dtype}"
        if reason is None and not hasattr(adapter, "conv2d_int8"):
            reason = f"there is no kernel of int8 for the backend {keras.backend.backend()}"
        if reason is None:
            outputs = adapter.conv2d_int8(
                inputs, self._kernel, self.kernel_scale, **geometry(self), **epilogue(self)
            )
            return activated(self, outputs)
        tell(self, reason)
        outputs = _conv2d_int8(inputs, self._kernel, self.kernel_scale, geometry(self))
        if self.use_bias:
            channels_first = self.data_format == "channels_first"
            shape = (1, -1, 1, 1) if channels_first else (1, 1, 1, -1)
            outputs = keras.ops.add(outputs, keras.ops.reshape(self.bias, shape))
        return outputs if self.activation is None else self.activation(outputs)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.built and self.quantization_mode is not None:
            store[str(1 + self.use_bias)] = self.kernel_scale

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        if self.built and self.quantization_mode is not None:
            self.kernel_scale.assign(store[str(1 + self.use_bias)])


def _has_defaults(config: Any) -> bool:
    """Whether an Int8QuantizationConfig asks for nothing but what the kernels do."""
    if config is None:
        return True
    quantizers = [config.weight_quantizer, config.activation_quantizer]
    return config.activation_quantizer is not None and all(
        quantizer is None
        or (
            type(quantizer) is keras.quantizers.AbsMaxQuantizer
            and tuple(quantizer.value_range) == (-127, 127)
            and quantizer.epsilon == _EPSILON
            and quantizer.output_dtype == "int8"
            # Which axes it is for depends on the layer.
            and quantizer.axis is None
        )
        for quantizer in quantizers
    )


def _conv2d_int8(
    inputs: Tensor, kernel: Tensor, kernel_scale: Tensor, options: dict[str, Any]
) -> Tensor:
    """fastconv.conv2d_int8 without a bias, in Keras's operations, on whole numbers in float32."""
    ops = keras.ops
    x = ops.cast(inputs, "float32")
    largest = ops.max(ops.abs(x), axis=(1, 2, 3), keepdims=True)
    scale = ops.stop_gradient(127.0 / (largest + _EPSILON))
    scaled = x * scale
    # Rounded, with the gradient of what is not: both together are the kernels' gradient.
    quantized = ops.stop_gradient(ops.round(scaled)) + (scaled - ops.stop_gradient(scaled))
    sums = ops.conv(quantized, ops.cast(ops.convert_to_tensor(kernel), "float32"), **options)
    channels_first = options["data_format"] == "channels_first"
    shape = (1, -1, 1, 1) if channels_first else (1, 1, 1, -1)
    factor = 1.0 / (ops.reshape(ops.cast(kernel_scale, "float32"), shape) * scale)
    return ops.cast(sums * factor, inputs.dtype)
