// Vectors that fill one register each, and loops over arrays of them that stay in registers.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vectors.h"

#if defined(DETR_FAST_HAS_VECTORS)
#define DETR_FAST_LAMBDA __attribute__((always_inline))
#else
#define DETR_FAST_LAMBDA
#endif

namespace detr_fast {

// Vectors of one register. Blocks of `rows` by three vectors of sums leave registers for the factors.
template <int Bytes>
struct Registers {
#if defined(DETR_FAST_HAS_VECTORS)
    using Floats = Vector<float, Bytes>;
    using Bits = Vector<uint32_t, Bytes>;
    using Ints = Vector<int32_t, Bytes>;
#else
    using Floats = float;
    using Bits = uint32_t;
    using Ints = int32_t;
#endif
    static constexpr int width = sizeof(Floats) / sizeof(float);
    static constexpr int rows = Bytes == 64 ? 8 : 4;
};

// each(0), each(1), ... each(count - 1), every index a constant: only then do GCC's arrays of vectors stay in
// registers.
template <typename Each, int... i>
DETR_FAST_INLINE void unrolled(const Each& each, std::integer_sequence<int, i...>) {
    (each(std::integral_constant<int, i>{}), ...);
}

template <int count, typename Each>
DETR_FAST_INLINE void unrolled(const Each& each) {
    unrolled(each, std::make_integer_sequence<int, count>{});
}

template <typename T>
DETR_FAST_INLINE T load_as(const void* from) {
    T x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <typename T>
DETR_FAST_INLINE void store_as(void* to, const T& x) {
    std::memcpy(to, &x, sizeof(x));
}

}  // namespace detr_fast
