// How much shared memory a block may have, for launchers that fall back to a workspace.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace detr_fast {

inline size_t rounded(size_t bytes) {
    return (bytes + 15) / 16 * 16;
}

inline cudaError_t shared_memory_limit(int device, size_t* limit) {
    int bytes = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    *limit = static_cast<size_t>(bytes);
    return error;
}

// Always for as much as the device has: the kernel keeps this from launch to launch, and another thread may be between
// its own call and its own launch.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t limit) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
}

}  // namespace detr_fast
