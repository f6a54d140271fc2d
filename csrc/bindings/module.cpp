// The Python module mezo_kernels._C. The files beside this one check arguments and forward them.
#include "bindings.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace mezo;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = MEZO_COMPILER;
  py::list isas;
  isas.append("portable");
#if defined(MEZO_X86)
  isas.append("avx2");
  isas.append("avx512");
#endif
  info["isa_paths"] = isas;
  info["openmp"] = kHasOpenMp;
#if defined(MEZO_CUDA)
  info["cuda_archs"] = MEZO_CUDA_ARCHS;
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of mezo_kernels; use them through the Python functions.";
  module.def("build_info", &build_info, "How this module was built.");
  bind_isa(module);
  bind_directions(module);
  bind_attention(module);
  bind_layers(module);
  bind_lora(module);
#if defined(MEZO_CUDA)
  bind_directions_cuda(module);
#endif
}
