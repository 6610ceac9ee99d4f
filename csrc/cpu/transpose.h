// Tokens as they lie, [count, size] in steps of token_stride, as lanes of vectors, [size, lanes], and back: square by
// square in registers. One number at a time it costs as much as a twentieth of attention on 850 keys, a third on 100.

#pragma once

#include <algorithm>
#include <cstdint>

#include "registers.h"

namespace detr_fast {

#if defined(DETR_FAST_HAS_VECTORS)
#if defined(__clang__)
#define DETR_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DETR_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename Registers<Bytes>::Ints{__VA_ARGS__})
#endif

// Swaps the lanes of a that have the bit `step` in their number with those of b that have not.
template <int Bytes, int step, int... lane>
DETR_FAST_INLINE void swap_lanes(typename Registers<Bytes>::Floats& a, typename Registers<Bytes>::Floats& b,
                                 std::integer_sequence<int, lane...>) {
    constexpr int width = Registers<Bytes>::width;
    const auto low = DETR_FAST_SHUFFLE(a, b, ((lane & step) != 0 ? width + lane - step : lane)...);
    b = DETR_FAST_SHUFFLE(a, b, ((lane & step) != 0 ? width + lane : lane + step)...);
    a = low;
}

template <int Bytes, int step = 1>
DETR_FAST_INLINE void transpose(typename Registers<Bytes>::Floats (&rows)[Registers<Bytes>::width]) {
    constexpr int width = Registers<Bytes>::width;
    unrolled<width>([&](auto r) DETR_FAST_LAMBDA {
        constexpr int row = decltype(r)::value;
        if constexpr ((row & step) == 0) {
            swap_lanes<Bytes, step>(rows[row], rows[row + step], std::make_integer_sequence<int, width>{});
        }
    });
    if constexpr (2 * step < width) transpose<Bytes, 2 * step>(rows);
}
#else
template <int Bytes>
DETR_FAST_INLINE void transpose(float (&)[1]) {}
#endif

// Multiplied by factor; zeros in lanes that have no token.
template <int Bytes>
DETR_FAST_INLINE void pack_transposed(const float* from, int64_t token_stride, int64_t count, int64_t size,
                                      int64_t lanes, float factor, float* packed) {
    using Floats = typename Registers<Bytes>::Floats;
    constexpr int width = Registers<Bytes>::width;
    const int64_t squares = size / width * width;
    for (int64_t lane = 0; lane < lanes; lane += width) {
        for (int64_t e = 0; e < squares; e += width) {
            Floats rows[width];
            unrolled<width>([&](auto r) DETR_FAST_LAMBDA {
                const int64_t token = lane + r;
                rows[r] = token < count ? load_as<Floats>(from + token * token_stride + e) * factor : Floats{};
            });
            transpose<Bytes>(rows);
            unrolled<width>([&](auto r) DETR_FAST_LAMBDA { store_as(packed + (e + r) * lanes + lane, rows[r]); });
        }
    }
    for (int64_t e = squares; e < size; ++e) {
        for (int64_t t = 0; t < lanes; ++t) packed[e * lanes + t] = t < count ? from[t * token_stride + e] * factor : 0;
    }
}

// Every lane multiplied by its factor; lanes that have no token are left out.
template <int Bytes>
DETR_FAST_INLINE void unpack_transposed(const float* packed, const float* factors, int64_t lanes, int64_t count,
                                        int64_t size, float* to, int64_t token_stride) {
    using Floats = typename Registers<Bytes>::Floats;
    constexpr int width = Registers<Bytes>::width;
    const int64_t squares = size / width * width;
    for (int64_t lane = 0; lane < count; lane += width) {
        const auto factor = load_as<Floats>(factors + lane);
        for (int64_t e = 0; e < squares; e += width) {
            Floats rows[width];
            unrolled<width>(
                [&](auto r) DETR_FAST_LAMBDA { rows[r] = load_as<Floats>(packed + (e + r) * lanes + lane) * factor; });
            transpose<Bytes>(rows);
            unrolled<width>([&](auto r) DETR_FAST_LAMBDA {
                if (lane + r < count) store_as(to + (lane + r) * token_stride + e, rows[r]);
            });
        }
    }
    for (int64_t e = squares; e < size; ++e) {
        for (int64_t t = 0; t < count; ++t) to[t * token_stride + e] = packed[e * lanes + t] * factors[t];
    }
}

}  // namespace detr_fast
