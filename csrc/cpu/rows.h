// Rows of a matrix of any floating dtype, read into and written from rows of the type that is computed in.

#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "../core/half_types.h"

struct detr_fast_rows {
    const void* address;
    int64_t stride;  // in elements, from row to row; columns are contiguous
    int32_t dtype;   // enum detr_fast_dtype
};

namespace detr_fast {

// Calls visit with the first element of row i, as a pointer to its own type.
template <typename Visit>
inline void visit_row(const detr_fast_rows& rows, int64_t i, const Visit& visit) {
    const int64_t offset = i * rows.stride;
    switch (rows.dtype) {
        case detr_fast_float64:
            return visit(static_cast<const double*>(rows.address) + offset);
        case detr_fast_bfloat16:
            return visit(static_cast<const Bfloat16*>(rows.address) + offset);
        case detr_fast_float16:
            return visit(static_cast<const Float16*>(rows.address) + offset);
        default:
            return visit(static_cast<const float*>(rows.address) + offset);
    }
}

template <typename Real>
inline void read_row(const detr_fast_rows& rows, int64_t i, int64_t columns, Real* __restrict__ to) {
    visit_row(rows, i, [&](const auto* __restrict__ from) {
        DETR_FAST_PRAGMA(omp simd)
        for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<Real>(widened(from[c]));
    });
}

// Adds row i to `to`; returns the sum over columns.
template <typename Real>
inline Real add_row(const detr_fast_rows& rows, int64_t i, int64_t columns, Real* __restrict__ to) {
    Real sum = 0;
    visit_row(rows, i, [&](const auto* __restrict__ from) {
        Real of_row = 0;
        DETR_FAST_PRAGMA(omp simd reduction(+ : of_row))
        for (int64_t c = 0; c < columns; ++c) {
            to[c] += static_cast<Real>(widened(from[c]));
            of_row += to[c];
        }
        sum = of_row;
    });
    return sum;
}

// Writes value(column) into row i of a contiguous matrix [.., columns].
template <typename Value>
inline void write_row(void* matrix, int32_t dtype, int64_t i, int64_t columns, const Value& value) {
    const auto write = [&](auto* __restrict__ to) {
        to += i * columns;
        DETR_FAST_PRAGMA(omp simd)
        for (int64_t c = 0; c < columns; ++c) narrow(value(c), to[c]);
    };
    switch (dtype) {
        case detr_fast_float64:
            return write(static_cast<double*>(matrix));
        case detr_fast_bfloat16:
            return write(static_cast<Bfloat16*>(matrix));
        case detr_fast_float16:
            return write(static_cast<Float16*>(matrix));
        default:
            return write(static_cast<float*>(matrix));
    }
}

}  // namespace detr_fast
