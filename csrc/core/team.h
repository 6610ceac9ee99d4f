// How the threads that share one problem work together: one thread on the CPU, a warp on the GPU.
//
// An algorithm written over a Team visits elements `lane(), lane() + size, ...`, combines what the lanes found with
// min(), max() and sum(), lets lane 0 do what is sequential, and calls sync() between a write and another lane's read.

#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define DETR_FAST_HD __host__ __device__ __forceinline__
#define DETR_FAST_SIMD_MIN(...)
#define DETR_FAST_SIMD_MAX(...)
#define DETR_FAST_SIMD_SUM(...)
#else
#define DETR_FAST_HD inline
// The lanes of a CPU's vector registers hold partial minima. Without the pragma a compiler keeps the order of
// comparisons, which -ffast-math would lift along with the meaning of infinities, and those forbid pairs here.
#define DETR_FAST_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define DETR_FAST_SIMD_MIN(...) DETR_FAST_PRAGMA(omp simd reduction(min : __VA_ARGS__))
#define DETR_FAST_SIMD_MAX(...) DETR_FAST_PRAGMA(omp simd reduction(max : __VA_ARGS__))
#define DETR_FAST_SIMD_SUM(...) DETR_FAST_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#endif

namespace detr_fast {

struct OneThread {
    static constexpr int size = 1;

    DETR_FAST_HD int lane() const { return 0; }
    DETR_FAST_HD void sync() const {}
    DETR_FAST_HD double min(double value) const { return value; }
    DETR_FAST_HD int32_t max(int32_t value) const { return value; }
    DETR_FAST_HD double sum(double value) const { return value; }
};

#if defined(__CUDACC__)

struct Warp {
    static constexpr int size = 32;
    static constexpr unsigned everyone = 0xffffffffu;

    __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x % size); }
    __device__ __forceinline__ void sync() const { __syncwarp(everyone); }

    // Two integer reductions in hardware instead of five double shuffles: the bits of a double, with the sign bit
    // flipped (all bits for a negative one), order as unsigned integers do.
    __device__ __forceinline__ double min(double value) const {
        const auto bits = static_cast<uint64_t>(__double_as_longlong(value));
        const uint64_t ordered = (bits >> 63) ? ~bits : bits | (1ull << 63);
        const auto high = static_cast<unsigned>(ordered >> 32);
        const unsigned lowest_high = __reduce_min_sync(everyone, high);
        const unsigned low = high == lowest_high ? static_cast<unsigned>(ordered) : 0xffffffffu;
        const uint64_t lowest = (static_cast<uint64_t>(lowest_high) << 32) | __reduce_min_sync(everyone, low);
        return __longlong_as_double(static_cast<long long>((lowest >> 63) ? lowest & ~(1ull << 63) : ~lowest));
    }

    __device__ __forceinline__ int32_t max(int32_t value) const { return __reduce_max_sync(everyone, value); }

    // The same on every lane: each adds the same pairs, if in another order.
    __device__ __forceinline__ double sum(double value) const {
        for (int distance = size / 2; distance > 0; distance /= 2) {
            value += __shfl_xor_sync(everyone, value, distance);
        }
        return value;
    }
};

#endif

}  // namespace detr_fast
