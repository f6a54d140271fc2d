// The CUDA half of mezo_kernels._C on the host, as a module of its own.
#include <pybind11/pybind11.h>

void bind_directions_cuda(pybind11::module_& module);

PYBIND11_MODULE(cuda_on_host, module) { bind_directions_cuda(module); }
