// The Python door to the GPU: the submodule _core.cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace fastconv::python {

void define_cuda(pybind11::module_& m);

}  // namespace fastconv::python
