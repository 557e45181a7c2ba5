# The slow functions that tests compare the kernels with: the same signatures.
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
