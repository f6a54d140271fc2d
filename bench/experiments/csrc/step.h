// The scalars of a MeZO step, computed where the losses are: mezo/optim/estimate.py in float64,
// operation by operation, on the host and on CUDA devices.
#pragma once

#include "cuda/target.h"
#include "table.h"

namespace mezo {

// The buffers of bench/experiments/device_step.py. directions has 2 n rows: those of the update,
// then those of the slots. losses has n plus losses, then n minus losses.
struct StepState {
  DirectionRow* directions;
  float* factors;  // the update's coefficients come first
  int32_t* num_updates;
  double* projected_grads;
  const double* losses;
  const double* settings;  // lr, eps, clip (infinity: none)
  int64_t num_directions;
};

#if defined(__CUDA_ARCH__)
MEZO_HD double sub64(double a, double b) { return __dsub_rn(a, b); }
MEZO_HD double mul64(double a, double b) { return __dmul_rn(a, b); }
MEZO_HD double div64(double a, double b) { return __ddiv_rn(a, b); }
#else
MEZO_HD double sub64(double a, double b) { return a - b; }
MEZO_HD double mul64(double a, double b) { return a * b; }
MEZO_HD double div64(double a, double b) { return a / b; }
#endif

// False for NaN.
MEZO_HD bool is_below(double value, double bound) { return value <= bound && -value <= bound; }

// Estimates direction k, writes its coefficient and moves it to the update's. Returns whether its
// losses are finite and the coefficient is finite in fp32.
MEZO_HD bool advance_direction(const StepState& s, int64_t k) {
  const int64_t n = s.num_directions;
  const double lr = s.settings[0], eps = s.settings[1], clip = s.settings[2];
  const double plus = s.losses[k], minus = s.losses[n + k];
  double grad = div64(sub64(plus, minus), mul64(2.0, eps));
  if (grad > clip) grad = clip;
  if (grad < -clip) grad = -clip;
  const double c = div64(mul64(-lr, grad), static_cast<double>(n));
  s.projected_grads[k] = grad;
  s.factors[k] = static_cast<float>(c);
  s.directions[k] = s.directions[n + k];
  s.directions[n + k].step = (s.directions[k].step + 1) & 0xFFFFFFFF;
  constexpr double kMaxFloat32 = 0x1.fffffep127, kMaxFloat64 = 0x1.fffffffffffffp1023;
  return is_below(plus, kMaxFloat64) && is_below(minus, kMaxFloat64) && is_below(c, kMaxFloat32);
}

// Returns nullptr or the CUDA error as text.
const char* cuda_advance(const StepState& state, const CudaTarget& target);

}  // namespace mezo
