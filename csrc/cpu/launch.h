// Entry points of the CPU backend. Pointers are host addresses; results do not depend on the number
// of threads.
#pragma once

#include "../step.h"
#include "ops.h"

namespace mezo {

// The instruction set in use: "auto" picks the best one of this CPU. Returns false for one it lacks.
bool select_ops(const char* name);
const Ops& selected_ops();

void cpu_sample(float* out, const TensorRow& tensor, const DirectionRow& direction, int threads);

void cpu_add_directions(const TensorRow* tensors, int64_t num_tensors, const Combination& sum,
                        int threads);

void cpu_perturb(const TensorRow* masters, int64_t num_tensors, const Combination& update,
                 const FanOut& slots, int threads);

void cpu_advance(const StepState& state);

bool has_openmp();

}  // namespace mezo
