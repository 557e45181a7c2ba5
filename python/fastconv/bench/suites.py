"""The suites: layers of well-known networks, and random problems."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastconv.bench.problem import Problem, ProblemError, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def _conv(
    n: int,
    size: int,
    c: int,
    k: int | None,
    taps: int,
    stride: int = 1,
    pad: int | None = None,
    groups: int = 1,
    name: str = "",
) -> Problem:
    """A square layer; ``pad`` None keeps the size at stride 1."""
    pad = taps // 2 if pad is None else pad
    out = (size + 2 * pad - taps) // stride + 1
    return Problem(
        n, c, size, size, k, taps, taps, out, out,
        (stride, stride), (pad, pad), (1, 1), groups, name,
    )  # fmt: skip


def _pool(
    n: int, size: int, c: int, window: int, stride: int, pad: int = 0, name: str = ""
) -> Problem:
    return _conv(n, size, c, None, window, stride, pad, name=name)


def mnist() -> Iterator[Problem]:
    """The article's network, at its batch size and at 256."""
    for n in (32, 256):
        yield _conv(n, 28, 1, 32, 3, pad=0, name="conv1")
        yield _conv(n, 13, 32, 64, 3, pad=0, name="conv2")


def alexnet(n: int = 16) -> Iterator[Problem]:
    """In one column, as its author's later paper has it."""
    yield _conv(n, 224, 3, 64, 11, 4, 2, name="conv1")
    yield _conv(n, 27, 64, 192, 5, name="conv2")
    yield _conv(n, 13, 192, 384, 3, name="conv3")
    yield _conv(n, 13, 384, 256, 3, name="conv4")
    yield _conv(n, 13, 256, 256, 3, name="conv5")


def vgg16(n: int = 1) -> Iterator[Problem]:
    """Its nine different layers."""
    layers = {
        "conv1_1": (224, 3, 64),
        "conv1_2": (224, 64, 64),
        "conv2_1": (112, 64, 128),
        "conv2_2": (112, 128, 128),
        "conv3_1": (56, 128, 256),
        "conv3_2": (56, 256, 256),
        "conv4_1": (28, 256, 512),
        "conv4_2": (28, 512, 512),
        "conv5": (14, 512, 512),
    }
    for name, (size, c, k) in layers.items():
        yield _conv(n, size, c, k, 3, name=name)


def resnet50(batches: Iterable[int] = (1, 16)) -> Iterator[Problem]:
    """Its 23 different layers (version 1.5: the 3 x 3 layers stride)."""
    for n in batches:
        yield _conv(n, 224, 3, 64, 7, 2, name="conv1")
        size, c = 56, 64
        for stage, width in enumerate((64, 128, 256, 512), 2):
            stride = 1 if stage == 2 else 2
            out = size // stride
            yield _conv(n, size, c, width, 1, name=f"conv{stage}_1_reduce")
            if stride == 2:
                yield _conv(n, size, width, width, 3, 2, name=f"conv{stage}_1")
            yield _conv(n, out, width, 4 * width, 1, name=f"conv{stage}_expand")
            if stride == 2:
                yield _conv(n, size, c, 4 * width, 1, 2, name=f"conv{stage}_shortcut")
            yield _conv(n, out, 4 * width, width, 1, name=f"conv{stage}_reduce")
            yield _conv(n, out, width, width, 3, name=f"conv{stage}")
            size, c = out, 4 * width


def mobilenetv2(n: int = 1) -> Iterator[Problem]:
    """Its different layers, depthwise and 1 x 1."""
    yield _conv(n, 224, 3, 32, 3, 2, name="conv1")
    for size, c, stride in (
        (112, 32, 1), (112, 96, 2), (56, 144, 1), (56, 144, 2), (28, 192, 1), (28, 192, 2),
        (14, 384, 1), (14, 576, 1), (14, 576, 2), (7, 960, 1),
    ):  # fmt: skip
        yield _conv(n, size, c, c, 3, stride, groups=c, name=f"dw{size}x{c}s{stride}")
    for size, c, k in (
        (112, 32, 16), (112, 16, 96), (56, 96, 24), (56, 24, 144), (56, 144, 24), (28, 144, 32),
        (28, 32, 192), (28, 192, 32), (14, 192, 64), (14, 64, 384), (14, 384, 64), (14, 384, 96),
        (14, 96, 576), (14, 576, 96), (7, 576, 160), (7, 160, 960), (7, 960, 160), (7, 960, 320),
        (7, 320, 1280),
    ):  # fmt: skip
        yield _conv(n, size, c, k, 1, name=f"pw{size}x{c}->{k}")


def mobilenet(n: int = 32) -> Iterator[Problem]:
    """MobileNet's depthwise layers as in training: of a batch that no cache holds."""
    for size, c, stride in (
        (112, 32, 1), (112, 64, 2), (56, 128, 1), (56, 128, 2), (28, 256, 1), (28, 256, 2),
        (14, 512, 1), (14, 512, 2), (7, 1024, 1),
    ):  # fmt: skip
        yield _conv(n, size, c, c, 3, stride, groups=c, name=f"dw{size}x{c}s{stride}")


def grouped(n: int = 8) -> Iterator[Problem]:
    """ResNeXt's 3 x 3 layers of 32 groups, and AlexNet's layers of two columns."""
    for size, c in ((56, 128), (28, 256), (14, 512), (7, 1024)):
        yield _conv(n, size, c, c, 3, groups=32, name=f"resnext{size}")
    yield _conv(n, 27, 96, 256, 5, groups=2, name="alexnet2")
    yield _conv(n, 13, 384, 256, 3, groups=2, name="alexnet5")
    yield _conv(n, 28, 128, 128, 3, groups=8, name="g8")


def efficientnet(n: int = 1) -> Iterator[Problem]:
    """EfficientNet-B0's depthwise layers; its 1 x 1 layers are like MobileNetV2's."""
    for size, c, taps, stride in (
        (112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (56, 144, 5, 2), (28, 240, 5, 1),
        (28, 240, 3, 2), (14, 480, 3, 1), (14, 480, 5, 1), (14, 672, 5, 1), (14, 672, 5, 2),
        (7, 1152, 5, 1), (7, 1152, 3, 1),
    ):  # fmt: skip
        yield _conv(n, size, c, c, taps, stride, groups=c, name=f"dw{size}x{c}k{taps}s{stride}")


def convnext(n: int = 1) -> Iterator[Problem]:
    """ConvNeXt-T's layers but the 1 x 1 ones, which are Dense."""
    yield _conv(n, 224, 3, 96, 4, 4, 0, name="stem")
    for size, c in ((56, 96), (28, 192), (14, 384), (7, 768)):
        yield _conv(n, size, c, c, 7, groups=c, name=f"dw{size}x{c}")
    for size, c in ((56, 96), (28, 192), (14, 384)):
        yield _conv(n, size, c, 2 * c, 2, 2, 0, name=f"down{size}x{c}")


def dilated() -> Iterator[Problem]:
    """Dilated 3 x 3 layers of networks that segment images: DeepLabV3 on 513 x 513 pixels, a
    context network (Yu and Koltun) and Xception's depthwise layer."""
    for name, size, c, k, groups, dilations in (
        ("conv5", 33, 512, 512, 1, (2, 4)),
        ("aspp", 33, 2048, 256, 1, (6, 12, 18)),
        ("context", 64, 64, 64, 1, (2, 4, 8, 16)),
        ("xception", 33, 728, 728, 728, (2,)),
    ):
        for d in dilations:
            yield parse(f'mb1g{groups}ic{c}ih{size}oc{k}kh3ph{d}dh{d - 1}n"{name}_d{d}"')


def sequences() -> Iterator[Problem]:
    """Layers in one dimension: those of temporal and text networks, of speech, and Inception's
    filters of a single row or column."""
    for n, steps, c, k, taps, d, name in (
        (8, 1024, 64, 64, 3, 1, "tcn_d1"),
        (8, 1024, 64, 64, 3, 8, "tcn_d8"),
        (8, 4000, 32, 64, 2, 16, "wavenet_d16"),
        (32, 400, 128, 128, 3, 1, "text3"),
        (32, 400, 128, 128, 4, 1, "text4"),
        (32, 400, 128, 128, 5, 1, "text5"),
        (64, 128, 9, 64, 5, 1, "sensors"),
        (8, 500, 256, 256, 11, 1, "jasper"),
    ):
        pad = (taps - 1) * d // 2
        yield parse(
            f'mb{n}ic{c}ih1iw{steps}oc{k}oh1ow{steps}kh1kw{taps}ph0pw{pad}dh{d - 1}n"{name}"'
        )
    yield parse('mb4g256ic256ih1iw500oc256oh1ow500kh1kw31ph0pw15n"conformer"')
    yield parse('mb64g128ic128ih1iw1000oc128oh1ow1000kh1kw9ph0pw4n"separable"')
    yield parse('mb64g128ic128ih1iw1000oc128oh1ow500kh1kw9sh1sw2ph0pw4n"separable_s2"')
    for c, k, kernel, name in (
        (128, 128, "kh1kw7ph0pw3", "inception1x7"),
        (160, 192, "kh7kw1ph3pw0", "inception7x1"),
    ):
        yield parse(f'mb4ic{c}ih17oc{k}oh17{kernel}n"{name}"')
    yield parse('mb4ic384ih8oc384oh8kh1kw3ph0pw1n"inception1x3"')


def deepbench() -> Iterator[Problem]:
    """The convolutions of DeepBench's list for training, at its smaller batch sizes."""
    rows = (  # width, height, channels, images, filters, taps, padding, strides (width, height)
        (700, 161, 1, 4, 32, (20, 5), (0, 0), (2, 2)),
        (341, 79, 32, 4, 32, (10, 5), (0, 0), (2, 2)),
        (480, 48, 1, 16, 16, (3, 3), (1, 1), (1, 1)),
        (240, 24, 16, 16, 32, (3, 3), (1, 1), (1, 1)),
        (120, 12, 32, 16, 64, (3, 3), (1, 1), (1, 1)),
        (60, 6, 64, 16, 128, (3, 3), (1, 1), (1, 1)),
        (108, 108, 3, 8, 64, (3, 3), (1, 1), (2, 2)),
        (54, 54, 64, 8, 64, (3, 3), (1, 1), (1, 1)),
        (27, 27, 128, 8, 128, (3, 3), (1, 1), (1, 1)),
        (14, 14, 128, 8, 256, (3, 3), (1, 1), (1, 1)),
        (7, 7, 256, 8, 512, (3, 3), (1, 1), (1, 1)),
        (224, 224, 3, 8, 64, (3, 3), (1, 1), (1, 1)),
        (112, 112, 64, 8, 128, (3, 3), (1, 1), (1, 1)),
        (56, 56, 128, 8, 256, (3, 3), (1, 1), (1, 1)),
        (28, 28, 256, 8, 512, (3, 3), (1, 1), (1, 1)),
        (14, 14, 512, 8, 512, (3, 3), (1, 1), (1, 1)),
        (7, 7, 512, 8, 512, (3, 3), (1, 1), (1, 1)),
        (224, 224, 3, 16, 64, (7, 7), (3, 3), (2, 2)),
        (28, 28, 192, 16, 32, (5, 5), (2, 2), (1, 1)),
        (28, 28, 192, 16, 64, (1, 1), (0, 0), (1, 1)),
        (14, 14, 512, 16, 48, (5, 5), (2, 2), (1, 1)),
        (14, 14, 512, 16, 192, (1, 1), (0, 0), (1, 1)),
        (7, 7, 832, 16, 256, (1, 1), (0, 0), (1, 1)),
        (7, 7, 832, 16, 128, (5, 5), (2, 2), (1, 1)),
    )
    for w, h, c, n, k, (s, r), (pad_w, pad_h), (stride_w, stride_h) in rows:
        yield parse(
            f"mb{n}ic{c}ih{h}iw{w}oc{k}kh{r}kw{s}ph{pad_h}pw{pad_w}sh{stride_h}sw{stride_w}"
        )


def pooling() -> Iterator[Problem]:
    """The article's poolings, those of AlexNet, VGG-16 and ResNet-50, and all of an image."""
    for n in (32, 256):
        yield _pool(n, 26, 32, 2, 2, name="mnist1")
        yield _pool(n, 11, 64, 2, 2, name="mnist2")
    yield _pool(16, 55, 64, 3, 2, name="alexnet1")
    yield _pool(16, 27, 192, 3, 2, name="alexnet2")
    yield _pool(1, 224, 64, 2, 2, name="vgg1")
    yield _pool(1, 28, 512, 2, 2, name="vgg4")
    yield _pool(16, 112, 64, 3, 2, 1, name="resnet")
    for n in (1, 32):
        yield _pool(n, 7, 2048, 7, 7, name="global")


def random(seed: int = 0, count: int = 20) -> Iterator[Problem]:
    """Problems nobody tuned for: odd channels, one output column, strides beyond the filter."""
    rng = np.random.default_rng(seed)
    found: list[Problem] = []
    while len(found) < count:
        n = int(rng.choice((1, 2, 5, 8, 16)))
        h = int(rng.integers(3, 80))
        w = h if rng.random() < 0.5 else int(rng.integers(3, 80))
        c = int(rng.choice((1, 2, 3, 5, 7, 8, 11, 13, 16, 24, 31, 33, 48, 65, 96, 130)))
        k = int(rng.choice((1, 4, 7, 9, 16, 17, 30, 32, 47, 64, 70, 129, 192)))
        r = int(rng.choice((1, 2, 3, 3, 3, 4, 5, 7)))
        s = r if rng.random() < 0.7 else int(rng.choice((1, 2, 3, 4, 5)))
        stride = int(rng.choice((1, 1, 1, 2, 3, 4)))
        dilation = int(rng.choice((1, 1, 1, 2)))
        if rng.random() < 0.1:  # a single column of output
            w = (s - 1) * dilation + 1
        pad = int(rng.integers(0, r)) if r > 1 else 0
        text = f"mb{n}ic{c}ih{h}iw{w}oc{k}kh{r}kw{s}sh{stride}ph{pad}pw{min(pad, s - 1)}"
        try:
            problem = parse(f"{text}dh{dilation - 1}" if dilation > 1 else text)
        except ProblemError:
            continue
        if 1e6 <= problem.flops() <= 1e9:
            found.append(problem)
    yield from found


SUITES: dict[str, Callable[..., Iterator[Problem]]] = {
    "mnist": mnist,
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
    "convnext": convnext,
    "grouped": grouped,
    "dilated": dilated,
    "sequences": sequences,
    "deepbench": deepbench,
    "pooling": pooling,
    "random": random,
}


def suite(name: str) -> list[Problem]:
    """The problems of a suite; ``random:SEED`` and ``random:SEED:COUNT`` too.

    Raises
    ------
    ProblemError
        If there is no suite of this name.
    """
    kind, *numbers = name.split(":")
    if kind not in SUITES or (numbers and kind != "random") or len(numbers) > 2:
        raise ProblemError(
            f"A suite must be one of {', '.join(SUITES)} or random:SEED:COUNT. Received: {name!r}"
        )
    try:
        return list(SUITES[kind](*map(int, numbers)))
    except ValueError as error:
        raise ProblemError(f"random:SEED:COUNT must hold integers. Received: {name!r}") from error
