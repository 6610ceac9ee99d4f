// What attention's forward and backward share on the CPU: products of small tiles in registers, and dropout of a tile.
//
// A tile of scores lies with its keys as rows and a block of queries as lanes of vectors. So the softmax over the keys
// goes down the rows without a step across lanes, a key's numbers are factors for all lanes as they lie in memory, and
// only the block of queries, which meets every key, is transposed.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/philox.h"
#include "attention.h"
#include "registers.h"
#include "transpose.h"
#include "widths.h"

namespace detr_fast {

// 2^x, as e^x in vectors.h: below -126 the result is 2^-126, above 127 it is wrong, and NaN stays NaN.
template <int Bytes>
DETR_FAST_INLINE typename Registers<Bytes>::Floats exp2_of_nonpositive(typename Registers<Bytes>::Floats x) {
    using Floats = typename Registers<Bytes>::Floats;
    const Floats floor = Floats{} - 126.0f;
    x = floor > x ? floor : x;
    const Floats shifted = x + exponential::rounder;
    const auto power = load_as<typename Registers<Bytes>::Bits>(&shifted) << 23;
    return exponential::power_of_two(x - (shifted - exponential::rounder)) * load_as<Floats>(&power);
}

constexpr int64_t tile_keys = 64;  // 32 and 128 are no faster at head size 32

constexpr int64_t largest_block = 48;  // queries: the lanes of 3 vectors of 16

inline const float* at(const detr_fast_tokens& tokens, int64_t token, int64_t head) {
    return tokens.data + token * tokens.token_stride + head * tokens.head_stride;
}

// Weights are 2^(factor * score - highest) with scores of queries that keep their numbers but for the scale's sign: the
// product is rounded once, with the subtraction.
inline float sign_of_scale(const detr_fast_attention& all) {
    return all.scale < 0 ? -1.0f : 1.0f;
}

inline float factor_of_scores(const detr_fast_attention& all) {
    return std::abs(all.scale) * exponential::log2_e;
}

// Two vectors of queries next, or three: whichever leaves no small block for the end.
template <int Bytes>
DETR_FAST_INLINE bool takes_two(int64_t queries_left) {
    const int64_t vectors = (queries_left + Registers<Bytes>::width - 1) / Registers<Bytes>::width;
    return vectors <= 2 || vectors == 4;
}

// Keys are packed up to a multiple of Registers<Bytes>::rows.
template <int Bytes>
DETR_FAST_INLINE int64_t whole_blocks(int64_t keys) {
    return (keys + Registers<Bytes>::rows - 1) / Registers<Bytes>::rows * Registers<Bytes>::rows;
}

// block[r][v] = sum over k of left[r * row_step + k * depth_step] * right[k * right_step + v * width].
// finish(r, v, sum) takes each.
template <int Bytes, int rows, int vectors, typename Finish>
DETR_FAST_INLINE void multiply_block(const float* left, int64_t row_step, int64_t depth_step, const float* right,
                                     int64_t right_step, int64_t depth, const Finish& finish) {
    using Floats = typename Registers<Bytes>::Floats;
    Floats sum[rows][vectors];
    const auto each_sum = [&](const auto& visit) DETR_FAST_LAMBDA {
        unrolled<rows>([&](auto r) DETR_FAST_LAMBDA {
            unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA { visit(r, v, sum[r][v]); });
        });
    };
    each_sum([](auto, auto, Floats& s) DETR_FAST_LAMBDA { s = Floats{}; });
    for (int64_t k = 0; k < depth; ++k) {
        Floats factor[vectors];
        unrolled<vectors>([&](auto v)
                              DETR_FAST_LAMBDA { factor[v] = load_as<Floats>(right + v * Registers<Bytes>::width); });
        each_sum([&](auto r, auto v, Floats& s) DETR_FAST_LAMBDA { s += left[r * row_step] * factor[v]; });
        left += depth_step;
        right += right_step;
    }
    each_sum([&](auto r, auto v, const Floats& s) DETR_FAST_LAMBDA { finish(int64_t{r}, v, s); });
}

// The same for any number of rows that is a multiple of Registers<Bytes>::rows. finish(row, v, sum).
template <int Bytes, int vectors, typename Finish>
DETR_FAST_INLINE void multiply(const float* left, int64_t rows, int64_t row_step, int64_t depth_step,
                               const float* right, int64_t right_step, int64_t depth, const Finish& finish) {
    for (int64_t row = 0; row < rows; row += Registers<Bytes>::rows) {
        const auto place = [&](int64_t r, auto v, const auto& sum) DETR_FAST_LAMBDA { finish(row + r, v, sum); };
        multiply_block<Bytes, Registers<Bytes>::rows, vectors>(left + row * row_step, row_step, depth_step, right,
                                                               right_step, depth, place);
    }
}

// Tokens of one head, [count, E] in steps of token_stride, multiplied by factor as [count, width] without gaps; zeros
// beyond E.
DETR_FAST_INLINE void pack(const float* from, int64_t token_stride, int64_t count, int64_t size, int64_t width,
                           float factor, float* packed) {
    for (int64_t t = 0; t < count; ++t) {
        const float* token = from + t * token_stride;
        for (int64_t e = 0; e < size; ++e) packed[t * width + e] = token[e] * factor;
        std::fill_n(packed + t * width + size, width - size, 0.0f);
    }
}

// Keys or values as [whole_blocks, E]: the last one again and again beyond them, which changes no row's highest score.
template <int Bytes>
DETR_FAST_INLINE void pack_keys(const float* from, int64_t token_stride, int64_t count, int64_t size, float* packed) {
    pack(from, token_stride, count, size, size, 1.0f, packed);
    for (int64_t t = count; t < whole_blocks<Bytes>(count); ++t)
        std::copy_n(packed + (count - 1) * size, size, packed + t * size);
}

// The products of every second number of a and of b, all of 64 bits. GCC has no word of its own for that.
#if defined(DETR_FAST_HAS_VECTORS)
inline Vector<uint64_t, 16> wide_products(const Vector<uint64_t, 16>& a, const Vector<uint64_t, 16>& b) {
#if defined(__SSE2__)
    return (Vector<uint64_t, 16>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
#endif

#if defined(DETR_FAST_MANY_TARGETS)
__attribute__((target("arch=x86-64-v3"))) inline Vector<uint64_t, 32> wide_products(const Vector<uint64_t, 32>& a,
                                                                                    const Vector<uint64_t, 32>& b) {
    return (Vector<uint64_t, 32>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

__attribute__((target("arch=x86-64-v4"))) inline Vector<uint64_t, 64> wide_products(const Vector<uint64_t, 64>& a,
                                                                                    const Vector<uint64_t, 64>& b) {
    return (Vector<uint64_t, 64>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#elif defined(DETR_FAST_HAS_VECTORS)
template <int Bytes>
DETR_FAST_INLINE Vector<uint64_t, Bytes> wide_products(const Vector<uint64_t, Bytes>& a,
                                                       const Vector<uint64_t, Bytes>& b) {
    return (a & 0xffffffffu) * (b & 0xffffffffu);
}
#endif

// For philox_rounds: the words of every lane's product, those of even lanes and of odd lanes apart.
template <int Bytes>
struct WideProducts {
    using Bits = typename Registers<Bytes>::Bits;

    DETR_FAST_INLINE void operator()(const Bits& a, uint32_t b, Bits& high, Bits& low) const {
#if defined(DETR_FAST_HAS_VECTORS)
        using Wide = Vector<uint64_t, Bytes>;
        const Wide even = wide_products((Wide)a, Wide{} + b), odd = wide_products((Wide)a >> 32, Wide{} + b);
        high = (Bits)((even >> 32) | (odd & ~uint64_t{0xffffffffu}));
        low = (Bits)((even & uint64_t{0xffffffffu}) | (odd << 32));
#else
        WideProduct{}(a, b, high, low);
#endif
    }
};

// Which weights of a tile are kept, see detr_fast/ops/dropout.py: the words of 32 keys, a lane for each query.
template <int Bytes, int vectors>
class KeptWeights {
  public:
    using Floats = typename Registers<Bytes>::Floats;
    using Bits = typename Registers<Bytes>::Bits;
    using Ints = typename Registers<Bytes>::Ints;
    static constexpr int64_t lanes = vectors * Registers<Bytes>::width;
    static constexpr int64_t group_keys = 32;

    DETR_FAST_INLINE void start(const detr_fast_attention& all, int64_t image, int64_t head, int64_t first_query) {
        image_ = static_cast<uint32_t>(image);
        head_ = static_cast<uint32_t>(head);
        first_query_ = static_cast<uint32_t>(first_query);
        threshold_ = static_cast<int32_t>(all.dropout_threshold);
        seed_ = all.dropout_seed;
    }

    // The words of the 32 keys from first_key on.
    DETR_FAST_INLINE void draw(int64_t first_key) {
        for (int64_t lane = 0; lane < lanes; lane += Registers<Bytes>::width) {
            uint32_t query[Registers<Bytes>::width];
            for (int l = 0; l < Registers<Bytes>::width; ++l) query[l] = first_query_ + static_cast<uint32_t>(lane + l);
            for (int64_t call = 0; call < 4; ++call) {
                Bits word[4] = {Bits{} + static_cast<uint32_t>(first_key / group_keys * 4 + call), load_as<Bits>(query),
                                Bits{} + head_, Bits{} + image_};
                philox_rounds<7>(word[0], word[1], word[2], word[3], seed_, WideProducts<Bytes>{});
                for (int w = 0; w < 4; ++w) store_as(words_ + (call * 4 + w) * lanes + lane, word[w]);
            }
        }
    }

    // The number that stands at a key of the group drawn last and a lane, or 0 where their weight is dropped.
    DETR_FAST_INLINE Floats kept(int64_t key, int64_t lane, const Floats& number) const {
        const int64_t word = key % 8 / 2 * 4 + key % group_keys / 8;
        const Bits random = (load_as<Bits>(words_ + word * lanes + lane) >> (key % 2 * 16)) & 0xffffu;
        return load_as<Ints>(&random) >= threshold_ ? number : Floats{};
    }

  private:
    uint32_t image_, head_, first_query_;
    int32_t threshold_;
    uint64_t seed_;
    alignas(64) uint32_t words_[16 * lanes];
};

}  // namespace detr_fast
