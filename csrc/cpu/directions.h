// Directions on the CPU: sample, add_directions_ and perturb_into. Pointers are host addresses;
// results do not depend on the number of threads.
#pragma once

#include "table.h"

namespace mezo {

void cpu_sample(float* out, const TensorRow& tensor, const DirectionRow& direction, int threads);

void cpu_add_directions(const TensorRow* tensors, int64_t num_tensors, const Combination& sum,
                        int threads);

void cpu_perturb(const TensorRow* masters, int64_t num_tensors, const Combination& update,
                 const FanOut& slots, int threads);

}  // namespace mezo
