// A host that runs CUDA kernels, to prove them without a GPU: found instead of CUDA's own header of this name, it lets
// a C++ compiler build a .cu file as it is.
//
// Every thread of a block is a fiber. It runs until it meets the other lanes of its warp (__syncwarp, a shuffle or a
// reduction) or all threads of its block (__syncthreads), and then a lane drawn at random goes on. So a write that
// another lane reads without a barrier between them is soon read too early. Memory is shared as on the device; shared
// memory starts out as NaN in every block.

#pragma once

#if !defined(__CUDACC__)
#error "compile with -D__CUDACC__, so that the sources show their device code"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace simt {

constexpr int warp_size = 32;

extern size_t shared_limit;  // what the device says it has; a test lowers it to force other placements
extern unsigned char* shared_memory;
extern size_t shared_capacity;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Waits for all lanes of the warp; returns what each of them brought, by lane.
const uint64_t* meet(const char* what, uint64_t brought);

// Waits for all threads of the block, unless a test has this line's barrier missing.
void meet_block(int line);

int lane();

template <typename T, typename Combine>
T reduce(const char* what, T value, Combine combine) {
    const uint64_t* values = meet(what, static_cast<uint64_t>(value));
    T result = static_cast<T>(values[0]);
    for (int lane = 1; lane < warp_size; ++lane) result = combine(result, static_cast<T>(values[lane]));
    return result;
}

}  // namespace simt

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = static_cast<int>(simt::shared_limit);
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "an error";
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
    simt::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
    return cudaSuccess;
}

inline void __syncwarp(unsigned = ~0u) {
    simt::meet("__syncwarp", 0);
}
inline void __syncthreads(int line = __builtin_LINE()) {
    simt::meet_block(line);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a lane brings 64 bits");
    uint64_t brought = 0;
    std::memcpy(&brought, &value, sizeof value);
    const uint64_t* values = simt::meet("__shfl_xor_sync", brought);
    std::memcpy(&value, &values[simt::lane() ^ lane_mask], sizeof value);
    return value;
}
template <typename T>
T atomicAdd(T* address, T value) {  // no other fiber runs in between
    const T before = *address;
    *address += value;
    return before;
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
    return simt::reduce("__reduce_min_sync", value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline int __reduce_max_sync(unsigned, int value) {
    return simt::reduce("__reduce_max_sync", value, [](int a, int b) { return a > b ? a : b; });
}
inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
