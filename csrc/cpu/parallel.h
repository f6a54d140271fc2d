// A loop over independent items, on one thread or several.
#pragma once

#include <stdint.h>

namespace mezo {

#if defined(_OPENMP)
constexpr bool kHasOpenMp = true;
#else
constexpr bool kHasOpenMp = false;
#endif

namespace {

template <class Visit>
void for_each_item(int64_t num_items, int threads, Visit&& visit) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#else
  (void)threads;
#endif
  for (int64_t item = 0; item < num_items; ++item) visit(item);
}

}  // namespace
}  // namespace mezo
