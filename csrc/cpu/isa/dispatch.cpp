// Which instruction set the CPU backend uses.
#include <string.h>

#include "ops.h"

namespace mezo {
namespace {

const Ops* supported_ops(const char* name) {
  const bool is_auto = strcmp(name, "auto") == 0;
#if defined(MEZO_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (is_auto || strcmp(name, "avx512") == 0)) return &avx512_ops();
  if (has_avx2 && (is_auto || strcmp(name, "avx2") == 0)) return &avx2_ops();
#endif
  if (is_auto || strcmp(name, "portable") == 0) return &portable_ops();
  return nullptr;
}

const Ops*& current() {
  static const Ops* ops = supported_ops("auto");
  return ops;
}

}  // namespace

bool select_ops(const char* name) {
  const Ops* ops = supported_ops(name);
  if (ops == nullptr) return false;
  current() = ops;
  return true;
}

const Ops& selected_ops() { return *current(); }

}  // namespace mezo
