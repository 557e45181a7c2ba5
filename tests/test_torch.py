"""fastconv.torch beside torch.nn.functional: values, gradients, memory formats, torch.compile."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.nn import functional

import fastconv
import fastconv.torch as ops

FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)


def assert_all_close(actual, wanted, tolerance=3e-5):
    """Element-wise, relative to the largest value of each tensor."""
    for a, w in zip(actual, wanted, strict=True):
        a, w = a.detach().numpy(), w.detach().numpy()
        assert (a.shape, a.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * np.abs(w).max(initial=1e-30))


def two_orders(function, inputs):
    """function(*inputs), and its gradients by every input of first and second order."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    slopes = torch.autograd.grad(torch.sin(y).sum(), inputs, create_graph=True)
    penalty = sum(torch.sin(slope).sum() for slope in slopes)
    return [y, *slopes, *torch.autograd.grad(penalty, inputs)]


@pytest.fixture
def draw(rng):
    return lambda *shape: torch.from_numpy(rng.standard_normal(shape, "float32"))


@pytest.fixture
def executed():
    """How often each kernel has run since the test began; those that have not are left out."""
    before = ops.ops_executed()
    return lambda: {
        name: count - before[name]
        for name, count in ops.ops_executed().items()
        if count > before[name]
    }


@FORMATS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 3), "padding": (2, 0), "groups": 2},
        {"padding": "same", "dilation": (2, 1), "groups": 4},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_conv2d(options, memory_format, draw, executed):
    x = draw(2, 4, 9, 8).contiguous(memory_format=memory_format)
    w, bias = draw(8, 4 // options.get("groups", 1), 3, 2), draw(8)
    wanted = two_orders(lambda *inputs: functional.conv2d(*inputs, **options), [x, w, bias])
    actual = two_orders(lambda *inputs: ops.conv2d(*inputs, **options), [x, w, bias])
    assert actual[0].is_contiguous(memory_format=memory_format)
    assert_all_close(actual, wanted)
    assert set(executed()) == {
        "FastconvConv2D",
        "FastconvConv2DGradInput",
        "FastconvConv2DGradFilter",
    }


@FORMATS
def test_relu(memory_format, draw):
    inputs = [draw(2, 4, 7, 7).contiguous(memory_format=memory_format), draw(8, 4, 3, 3), draw(8)]
    wanted = two_orders(lambda *inputs: torch.relu(functional.conv2d(*inputs)), inputs)
    assert_all_close(two_orders(lambda *i: ops.conv2d(*i, activation="relu"), inputs), wanted)


def test_one_channel_takes_the_format_of_the_filters(draw):
    x, w = draw(2, 1, 6, 6), draw(4, 1, 3, 3)
    assert ops.conv2d(x, w).is_contiguous()
    # Of one channel, filters have both formats, and the first counts.
    grouped = draw(2, 4, 1, 1), draw(4, 4, 1, 1)
    y = ops.conv2d(*grouped)
    assert_all_close([y], [functional.conv2d(*grouped)])
    w = draw(4, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    x = draw(2, 2, 6, 6).contiguous(memory_format=torch.channels_last)
    assert ops.conv2d(x, w).is_contiguous(memory_format=torch.channels_last)


@FORMATS
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    ],
    ids=str,
)
def test_max_pool2d(options, memory_format, draw):
    x = draw(2, 5, 9, 8).contiguous(memory_format=memory_format)
    wanted = two_orders(lambda x: functional.max_pool2d(x, **options), [x])
    actual = two_orders(lambda x: ops.max_pool2d(x, **options), [x])
    assert actual[0].is_contiguous(memory_format=memory_format)
    assert_all_close(actual, wanted)


@FORMATS
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ],
    ids=str,
)
def test_avg_pool2d(options, memory_format, draw):
    x = draw(2, 5, 9, 8).contiguous(memory_format=memory_format)
    wanted = two_orders(lambda x: functional.avg_pool2d(x, **options), [x])
    assert_all_close(two_orders(lambda x: ops.avg_pool2d(x, **options), [x]), wanted)


def test_without_a_batch(draw):
    x, w = draw(4, 6, 7), draw(8, 4, 3, 3)
    assert_all_close([ops.conv2d(x, w)], [functional.conv2d(x, w)])
    assert_all_close([ops.max_pool2d(x, 2)], [functional.max_pool2d(x, 2)])
    assert_all_close([ops.avg_pool2d(x, 2)], [functional.avg_pool2d(x, 2)])


def test_argmax_is_kept_for_gradients_alone(draw, executed):
    x = draw(1, 2, 4, 4)
    ops.max_pool2d(x, 2)
    with torch.no_grad():
        ops.max_pool2d(x.requires_grad_(), 2)
    assert executed() == {"FastconvMaxPool2D": 2}
    ops.max_pool2d(x, 2).sum().backward()
    assert executed() == {
        "FastconvMaxPool2D": 2,
        "FastconvMaxPool2DWithArgmax": 1,
        "FastconvMaxPool2DGrad": 1,
    }


def test_gradients_nobody_wants_are_not_computed(draw, executed):
    x, w = draw(1, 2, 6, 6), draw(2, 2, 3, 3).requires_grad_()
    ops.conv2d(x, w).sum().backward()
    assert executed() == {"FastconvConv2D": 1, "FastconvConv2DGradFilter": 1}


@FORMATS
def test_memory_is_not_copied(memory_format, draw, monkeypatch):
    """The compiled functions are given the very memory of the tensors."""
    from fastconv.adapters import _host

    seen = {}

    def run(name, arrays, attributes, out=None):
        seen.update(x=arrays[0], out=out, layout=attributes["data_format"])
        return real(name, arrays, attributes, out)

    real = _host.run
    monkeypatch.setattr(_host, "run", run)
    x = draw(2, 4, 6, 6).contiguous(memory_format=memory_format)
    y = ops.conv2d(x, draw(8, 4, 3, 3))
    assert seen["x"].ctypes.data == x.data_ptr()
    assert seen["out"].ctypes.data == y.data_ptr()
    assert seen["layout"] == ("NCHW" if memory_format is torch.contiguous_format else "NHWC")
    # As the functions of arrays do, bit by bit.
    if memory_format is torch.channels_last:
        w = draw(8, 4, 3, 3)
        wanted = fastconv.conv2d(
            x.permute(0, 2, 3, 1).numpy(), w.permute(2, 3, 1, 0).contiguous().numpy()
        )
        np.testing.assert_array_equal(ops.conv2d(x, w).permute(0, 2, 3, 1).numpy(), wanted)


def network(x, w, bias):
    y = ops.max_pool2d(ops.conv2d(x, w, bias, padding="same", activation="relu"), 2)
    return ops.avg_pool2d(ops.conv2d(y, w, stride=2, padding=1), 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, draw, executed):
    inputs = [draw(2, 4, 8, 8), draw(4, 4, 3, 3), draw(4)]

    def slopes(function):
        tensors = [tensor.detach().requires_grad_() for tensor in inputs]
        y = function(*tensors)
        return [y, *torch.autograd.grad(torch.sin(y).sum(), tensors)]

    wanted = slopes(network)
    before = executed()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    try:
        actual = slopes(compiled)
    except torch._inductor.exc.InductorError as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip(f"inductor finds no compiler: {error}")
    assert_all_close(actual, wanted)
    assert executed() == {name: 2 * count for name, count in before.items()}


def test_dynamic_shapes(draw):
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    w, bias = draw(4, 4, 3, 3), draw(4)
    for size in (8, 12, 16):
        x = draw(size // 4, 4, size, size + 4)
        assert_all_close([compiled(x, w, bias)], [network(x, w, bias)])


def test_ops_are_sound(draw):
    x, w, bias = (t.requires_grad_() for t in (draw(2, 6, 6, 4), draw(3, 3, 4, 8), draw(8)))
    geometry = ([1, 1], "SAME", [0, 0, 0, 0], "NHWC")
    torch.library.opcheck(torch.ops.fastconv.conv2d, (x, w, bias, *geometry, [1, 1], "RELU"))
    torch.library.opcheck(
        torch.ops.fastconv.max_pool2d_with_argmax, (x, [2, 2], "VALID", *geometry[2:], [2, 2])
    )
    torch.library.opcheck(
        torch.ops.fastconv.conv2d_max_pool2d, (x, w, None, *geometry, [1, 1], "RELU", 1)
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, w: ops.conv2d(x, w[:, :3]), ValueError, "`weight` must have 4 dimensions"),
        (lambda x, w: ops.conv2d(x, w, groups=3), ValueError, "groups=3"),
        (lambda x, w: ops.conv2d(x[0, 0], w), ValueError, "`input` must have 3 or 4 dimensions"),
        (lambda x, w: ops.conv2d(x[..., :2], w), ValueError, "Received"),
        (lambda x, w: ops.conv2d(x, w, w), ValueError, "`bias` must have shape"),
        (lambda x, w: ops.conv2d(x.double(), w), TypeError, "`x` must be of float32"),
        (lambda x, w: ops.conv2d(x.numpy(), w), TypeError, "`input` must be a torch.Tensor"),
        (lambda x, w: ops.conv2d(x, w, stride=2, padding="same"), ValueError, "`stride` must be 1"),
        (lambda x, w: ops.conv2d(x, w.numpy()), TypeError, "`weight` must be a torch.Tensor"),
        (lambda x, w: ops.conv2d(x, w, padding="full"), ValueError, "`padding` must be"),
        (lambda x, w: ops.conv2d(x, w, padding="SAME"), ValueError, "`padding` must be"),
        (lambda x, w: ops.conv2d(x, w, stride=(1, 1, 1)), ValueError, "`stride` must be"),
        (lambda x, w: ops.max_pool2d(x, 9), ValueError, "`pool_size` must not be larger"),
        (lambda x, w: ops.max_pool2d(x, 2, dilation=2), ValueError, "`dilation` must be 1"),
        (
            lambda x, w: ops.avg_pool2d(x, 2, padding=1, ceil_mode=True),
            ValueError,
            "`ceil_mode` must be False",
        ),
        (lambda x, w: ops.accelerate(3), TypeError, "`module` must be a torch.nn.Module"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(1, 4, 6, 6), torch.zeros(4, 4, 3, 3))


def test_accelerate(draw, executed):
    class Own(torch.nn.Conv2d):
        pass

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        Own(8, 8, 1),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(10),
    )
    x = draw(2, 3, 8, 8)
    model(x)
    stock = copy.deepcopy(model)
    assert ops.accelerate(model) is model
    assert model.state_dict().keys() == stock.state_dict().keys()
    for each in (model, stock):
        optimizer = torch.optim.SGD(each.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            torch.sin(each(x)).mean().backward()
            optimizer.step()
    assert_all_close(model.state_dict().values(), stock.state_dict().values(), 1e-4)
    counts = executed()
    assert counts["FastconvConv2D"] == counts["FastconvMaxPool2DWithArgmax"] == 3
    model.double()(x.double())
    assert executed() == counts, "other data types are PyTorch's"
    model.bfloat16()(x.bfloat16())
    assert executed()["FastconvConv2D"] == 4
    ops.restore(model)
    assert [type(module) for module in model] == [type(module) for module in stock]


def test_tuples_of_one(draw):
    x, w = draw(2, 3, 9, 8), draw(4, 3, 2, 2)
    options = {"stride": (2,), "padding": [1], "dilation": (2,)}
    assert_all_close([ops.conv2d(x, w, **options)], [functional.conv2d(x, w, **options)])
    for name in ("max_pool2d", "avg_pool2d"):
        options = {"kernel_size": (3,), "stride": [2], "padding": (1,), "ceil_mode": False}
        actual, wanted = (getattr(each, name)(x, **options) for each in (ops, functional))
        assert_all_close([actual], [wanted])
    stock = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, (1,)), torch.nn.MaxPool2d((2,), (2,)))
    assert_all_close([ops.accelerate(copy.deepcopy(stock))(x)], [stock(x)])


def two_models():
    stock = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 2, 3)
    )
    return stock, ops.accelerate(copy.deepcopy(stock))


def by_vmap(model, x):
    return torch.func.vmap(lambda image: model(image[None])[0])(x)


def by_gradients_of_samples(model, x):
    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).sin().sum()

    slopes = torch.func.grad(loss)
    return tuple(torch.func.vmap(slopes, (None, 0))(dict(model.named_parameters()), x).values())


def by_jvp(model, x):
    return torch.func.jvp(model, (x,), (x,))


def by_dual_numbers(model, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        return tuple(torch.autograd.forward_ad.unpack_dual(model(dual)))


def by_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()  # which has rounded it


@pytest.mark.parametrize(
    "transformed", [by_vmap, by_gradients_of_samples, by_jvp, by_dual_numbers, by_autocast]
)
def test_transforms_are_left_to_torch(transformed, draw, executed):
    stock, fast = two_models()
    x = draw(2, 3, 8, 9)
    wanted, actual = ([*transformed(model, x)] for model in (stock, fast))
    assert_all_close(actual, wanted, 0)
    assert not executed()
    fast(x)
    assert executed()


def test_jit_trace(draw, executed):
    stock, fast = two_models()
    x = draw(2, 3, 8, 9)
    traced = torch.jit.trace(fast, x)  # which compares what it traced
    executed_before = executed()["FastconvConv2D"]
    inputs = [draw(5, 3, 8, 9)]
    wanted, actual = (two_orders(model, inputs) for model in (stock, traced))
    assert_all_close(actual, wanted)
    assert executed()["FastconvConv2D"] > executed_before


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, memory_format, draw):
    """Each operation as of float32, and rounded; its gradients too."""
    x = draw(2, 4, 8, 8).to(dtype).contiguous(memory_format=memory_format)
    w, bias = draw(8, 4, 3, 3).to(dtype), draw(8).to(dtype)
    for function, given in [
        (lambda *inputs: ops.conv2d(*inputs, padding="same", activation="relu"), [x, w, bias]),
        (lambda x: ops.max_pool2d(x, 3, 2), [x]),
        (lambda x: ops.avg_pool2d(x, 2), [x]),
    ]:
        inputs = [tensor.detach().requires_grad_() for tensor in given]
        wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
        y, wanted = function(*inputs), function(*wide)
        dy = draw(*y.shape).to(dtype)
        found = [y, *torch.autograd.grad(y, inputs, dy, create_graph=True)]
        wanted = [wanted, *torch.autograd.grad(wanted, wide, dy.float())]
        for tensor, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(tensor, exact.to(dtype), rtol=0, atol=0)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(compiled, y, rtol=0, atol=0)
    x, w = x.detach().requires_grad_(), w.requires_grad_()
    (dx,) = torch.autograd.grad(ops.conv2d(x, w).sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), w)[0].dtype == dtype
    with pytest.raises(TypeError, match=r"`w` must be of .*, as the first tensor is"):
        ops.conv2d(x, w.float())
