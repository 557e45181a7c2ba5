# The kernels again, with the same signatures, each run `calls` times in one call; and the machine's
# limits.
from fastconv._core import (
    avg_pool2d as avg_pool2d,
)
from fastconv._core import (
    avg_pool2d_grad as avg_pool2d_grad,
)
from fastconv._core import (
    conv2d as conv2d,
)
from fastconv._core import (
    conv2d_grad_filter as conv2d_grad_filter,
)
from fastconv._core import (
    conv2d_grad_input as conv2d_grad_input,
)
from fastconv._core import (
    conv2d_max_pool2d as conv2d_max_pool2d,
)
from fastconv._core import (
    conv2d_max_pool2d_grad as conv2d_max_pool2d_grad,
)
from fastconv._core import (
    max_pool2d as max_pool2d,
)
from fastconv._core import (
    max_pool2d_grad as max_pool2d_grad,
)

def set_calls(calls: int) -> None: ...
def nanoseconds() -> list[int]: ...
def flops(seconds: float) -> float: ...
def bandwidth(stream: str, bytes: int, seconds: float) -> float: ...
