// How the launchers of this directory start a kernel.
#ifndef MEZO_CUDA_LAUNCHER
#define MEZO_CUDA_LAUNCHER

#include "target.h"

namespace mezo {
namespace {

// Makes a device current, and the one before again at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    is_changed_ = error_ == cudaSuccess && before_ != device;
    if (is_changed_) error_ = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (is_changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool is_changed_ = false;
  cudaError_t error_;
};

// Launches kernel(arguments...) and says what went wrong, if anything did.
template <class... Parameters, class... Arguments>
const char* launch(const CudaTarget& target, int64_t blocks, int threads,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  const CurrentDevice device(target.device);
  cudaError_t error = device.error();
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(target.stream)>>>(
        arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace mezo

#endif
