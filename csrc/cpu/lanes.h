// Eight doubles at once for the CPU's solvers, and how they divide their memory. GCC and Clang split a vector into the
// registers of the processor that a function is compiled for.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../core/lsap.h"
#include "floats.h"

namespace detr_fast {

// Divides memory into arrays that start on cache lines. With no base it only counts.
struct Layout {
    static constexpr size_t alignment = 64;

    unsigned char* base;
    size_t used;

    static Layout at(void* memory) {
        const auto address = reinterpret_cast<uintptr_t>(memory);
        return {reinterpret_cast<unsigned char*>((address + alignment - 1) / alignment * alignment), 0};
    }

    template <typename T>
    void take(T*& array, int64_t count) {
        array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        used += (static_cast<size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
    }
};

#if defined(DETR_FAST_HAS_FLOATS)
typedef double Eight __attribute__((vector_size(64)));
typedef int64_t EightIndices __attribute__((vector_size(64)));

template <typename Vector, typename T>
DETR_FAST_INLINE Vector load(const T* from) {
    Vector x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <typename Vector, typename T>
DETR_FAST_INLINE void store(T* to, Vector x) {
    std::memcpy(to, &x, sizeof(x));
}

DETR_FAST_INLINE Eight load_eight(const double* from) {
    return load<Eight>(from);
}

DETR_FAST_INLINE Eight load_eight(const float* from) {
    typedef float EightFloats __attribute__((vector_size(32)));
    return __builtin_convertvector(load<EightFloats>(from), Eight);
}

struct LowestLane {
    double value;
    int64_t index;
};

// The lowest value, and the lowest index among the lanes that have it.
DETR_FAST_INLINE LowestLane first_lowest(const Eight& values, const EightIndices& indices) {
    double value_of_lane[8];
    int64_t index_of_lane[8];
    store(value_of_lane, values);
    store(index_of_lane, indices);
    double lowest = value_of_lane[0];
    DETR_FAST_SIMD_MIN(lowest)
    for (int l = 0; l < 8; ++l) lowest = value_of_lane[l] < lowest ? value_of_lane[l] : lowest;
    int64_t first = std::numeric_limits<int64_t>::max();
    DETR_FAST_SIMD_MIN(first)
    for (int l = 0; l < 8; ++l) {
        const int64_t candidate = value_of_lane[l] == lowest ? index_of_lane[l] : first;
        first = candidate < first ? candidate : first;
    }
    return {lowest, first};
}
#endif

}  // namespace detr_fast
