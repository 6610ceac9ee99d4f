// Vectors of doubles for the CPU's solvers, and how they divide their memory.

#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../core/lsap.h"
#include "vectors.h"

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

#if defined(DETR_FAST_HAS_VECTORS)
template <int Bytes>
using Doubles = Vector<double, Bytes>;
template <int Bytes>
using Indices = Vector<int64_t, Bytes>;

template <int Bytes>
DETR_FAST_INLINE Doubles<Bytes> load_doubles(const double* from) {
    return load<Doubles<Bytes>>(from);
}

template <int Bytes>
DETR_FAST_INLINE Doubles<Bytes> load_doubles(const float* from) {
    return __builtin_convertvector((load<Vector<float, Bytes / 2>>(from)), Doubles<Bytes>);
}

struct LowestLane {
    double value;
    int64_t index;
};

// The lowest value, and the lowest index among the lanes that have it.
template <int Bytes>
DETR_FAST_INLINE LowestLane first_lowest(const Doubles<Bytes>& values, const Indices<Bytes>& indices) {
    constexpr int lanes = Bytes / 8;
    double value_of_lane[lanes];
    int64_t index_of_lane[lanes];
    store(value_of_lane, values);
    store(index_of_lane, indices);
    double lowest = value_of_lane[0];
    DETR_FAST_SIMD_MIN(lowest)
    for (int l = 0; l < lanes; ++l) lowest = value_of_lane[l] < lowest ? value_of_lane[l] : lowest;
    int64_t first = std::numeric_limits<int64_t>::max();
    DETR_FAST_SIMD_MIN(first)
    for (int l = 0; l < lanes; ++l) {
        const int64_t candidate = value_of_lane[l] == lowest ? index_of_lane[l] : first;
        first = candidate < first ? candidate : first;
    }
    return {lowest, first};
}
#endif

}  // namespace detr_fast
