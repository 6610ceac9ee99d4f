// Makes a device the current one and restores the one it found.

#pragma once

#include <cuda_runtime.h>

namespace detr_fast {

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&found_);
        if (status_ == cudaSuccess && found_ != device) {
            status_ = cudaSetDevice(device);
            changed_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(found_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    cudaError_t status() const { return status_; }

  private:
    int found_ = 0;
    bool changed_ = false;
    cudaError_t status_ = cudaSuccess;
};

}  // namespace detr_fast
