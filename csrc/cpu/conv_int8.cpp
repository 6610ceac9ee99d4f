// Convolution in 8-bit integers as one matrix product: the pixels under a kernel are gathered to a row, unless the map
// holds them so, and sums become bytes again while they are near.

#include "conv_int8.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "int8_tile.h"
#include "registers.h"
#include "thread_pool.h"
#include "widths.h"

namespace detr_fast {
namespace {

struct Int8Layer {
    const detr_fast_conv& shape;
    const uint8_t* x;
    const int8_t* packed;
    const detr_fast_int8_result& result;

    int64_t taps() const { return shape.kernel_height * shape.kernel_width; }
    int64_t pixels() const { return shape.batch * shape.out_height * shape.out_width; }
    int64_t panels() const { return (shape.out_channels + int8_panel_columns - 1) / int8_panel_columns; }
    int64_t depth() const {
        return (taps() * shape.channels + int8_depth_step - 1) / int8_depth_step * int8_depth_step;
    }
    // Whether a row of the product is a pixel of the map.
    bool is_direct() const {
        return taps() == 1 && shape.stride == 1 && shape.padding == 0 && shape.channels % int8_depth_step == 0;
    }
};

// The pixels under the kernel at one pixel of the result; those outside of the map and what is beyond are zeros.
void gather_row(const Int8Layer& layer, int64_t pixel, uint8_t* to) {
    const auto& s = layer.shape;
    const int64_t row = pixel / s.out_width, image = row / s.out_height;
    const int64_t top = row % s.out_height * s.stride - s.padding, start = pixel % s.out_width * s.stride - s.padding;
    const uint8_t* const map = layer.x + image * s.height * s.width * s.channels;
    uint8_t* const end = to + layer.depth();
    const bool in_one_piece = s.dilation == 1 && start >= 0 && start + s.kernel_width <= s.width;
    for (int64_t i = 0; i < s.kernel_height; ++i) {
        const int64_t y = top + i * s.dilation;
        const bool row_is_inside = y >= 0 && y < s.height;
        if (!row_is_inside || in_one_piece) {
            const auto bytes = static_cast<size_t>(s.kernel_width * s.channels);
            if (row_is_inside) std::memcpy(to, map + (y * s.width + start) * s.channels, bytes);
            if (!row_is_inside) std::memset(to, 0, bytes);
            to += bytes;
            continue;
        }
        for (int64_t j = 0; j < s.kernel_width; ++j, to += s.channels) {
            const int64_t x = start + j * s.dilation;
            const bool inside = x >= 0 && x < s.width;
            if (inside) std::memcpy(to, map + (y * s.width + x) * s.channels, static_cast<size_t>(s.channels));
            if (!inside) std::memset(to, 0, static_cast<size_t>(s.channels));
        }
    }
    std::memset(to, 0, static_cast<size_t>(end - to));
}

// Rounds to the nearest integer, ties to even, and NaN to 0.
template <typename Floats, typename Ints>
DETR_FAST_INLINE Ints nearest_byte(Floats x) {
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it has no bits for a fraction
    const Floats zero{}, highest = zero + 255.0f;
    x = x > zero ? x : zero;
    x = x < highest ? x : highest;
    const Floats shifted = x + rounder;
    return load_as<Ints>(&shifted) & 0xff;
}

#if defined(DETR_FAST_HAS_VECTORS)
template <int Bytes>
using Numbers = Vector<uint8_t, Bytes / 4>;  // as many bytes as a register has floats
#endif

template <int Bytes>
class Int8Block {
  public:
    using Floats = typename Registers<Bytes>::Floats;
    using Ints = typename Registers<Bytes>::Ints;
    static constexpr int width = Registers<Bytes>::width;

    // Sums of `rows` pixels and a panel's columns to the result.
    DETR_FAST_INLINE static void finish(const Int8Layer& layer, int64_t pixel, int64_t rows, int64_t column,
                                        const int32_t* sums) {
        const int64_t columns = std::min(int8_panel_columns, layer.shape.out_channels - column);
        for (int64_t c = 0; c < columns; c += width) {
            const int64_t count = std::min<int64_t>(width, columns - c);
            const Floats factor = load_as<Floats>(layer.result.factor + column + c);
            const Floats bias = load_as<Floats>(layer.result.bias + column + c);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t place = (pixel + r) * layer.shape.out_channels + column + c;
                const Floats y = floats(load_as<Ints>(sums + r * int8_panel_columns + c)) * factor + bias;
                finish_few(layer.result, y, place, count);
            }
        }
    }

  private:
    DETR_FAST_INLINE static Floats floats(Ints x) {
#if defined(DETR_FAST_HAS_VECTORS)
        return __builtin_convertvector(x, Floats);
#else
        return static_cast<float>(x);
#endif
    }

    DETR_FAST_INLINE static void finish_few(const detr_fast_int8_result& result, Floats y, int64_t place,
                                            int64_t count) {
        if (result.residual != nullptr)
            y += floats(load_bytes(result.residual + place, count)) * result.residual_factor;
        if (!result.is_float) {
            return store_bytes(static_cast<uint8_t*>(result.out) + place, nearest_byte<Floats, Ints>(y), count);
        }
        const Floats lowest = Floats{} + (result.relu ? 0.0f : -__builtin_inff());
        y = y < lowest ? lowest : y;
        std::memcpy(static_cast<float*>(result.out) + place, &y, static_cast<size_t>(count) * sizeof(float));
    }

    DETR_FAST_INLINE static Ints load_bytes(const uint8_t* from, int64_t count) {
#if defined(DETR_FAST_HAS_VECTORS)
        Numbers<Bytes> bytes{};
        if (count == width) bytes = load_as<Numbers<Bytes>>(from);
        if (count != width) std::memcpy(&bytes, from, static_cast<size_t>(count));
        return __builtin_convertvector(bytes, Ints);
#else
        (void)count;
        return *from;
#endif
    }

    DETR_FAST_INLINE static void store_bytes(uint8_t* to, Ints x, int64_t count) {
#if defined(DETR_FAST_HAS_VECTORS)
        const auto bytes = __builtin_convertvector(x, Numbers<Bytes>);
        if (count == width) return store_as(to, bytes);
        std::memcpy(to, &bytes, static_cast<size_t>(count));
#else
        (void)count;
        *to = static_cast<uint8_t>(x);
#endif
    }
};

struct FinishTask {
    const Int8Layer& layer;
    int64_t pixel, rows, column;
    const int32_t* sums;

    template <int Bytes>
    bool run() const {
        Int8Block<Bytes>::finish(layer, pixel, rows, column, sums);
        return true;
    }
};

// Pixels [first, end) of the result, in all of its columns.
void run_block(const Int8Layer& layer, const Int8Products& products, int64_t first, int64_t end) {
    static thread_local std::vector<uint8_t> memory;
    alignas(64) int32_t sums[int8_rows * int8_panel_columns];
    const int64_t depth = layer.depth(), tiles = (end - first + int8_rows - 1) / int8_rows;
    // The last rows are gathered in any case: a tile of AMX reads beyond them.
    const int64_t direct = layer.is_direct() ? (end - first) / int8_rows : 0;
    memory.resize(static_cast<size_t>((tiles - direct) * int8_rows * depth));
    for (int64_t p = first + direct * int8_rows; p < end; ++p) {
        gather_row(layer, p, memory.data() + (p - first - direct * int8_rows) * depth);
    }
    for (int64_t panel = 0; panel < layer.panels(); ++panel) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t pixel = first + tile * int8_rows, rows = std::min(int8_rows, end - pixel);
            const uint8_t* left = layer.x + pixel * depth;
            if (tile >= direct) left = memory.data() + (tile - direct) * int8_rows * depth;
            products.multiply({left, depth, rows, depth, layer.packed + panel * depth * int8_panel_columns, sums});
            with_widest_vectors(FinishTask{layer, pixel, rows, panel * int8_panel_columns, sums});
        }
    }
}

struct ToBytesTask {
    const float* from;
    int64_t count;
    float factor;
    uint8_t* to;

    template <int Bytes>
    bool run() const {
        for (int64_t i = 0; i < count; ++i)
            to[i] = static_cast<uint8_t>(nearest_byte<float, int32_t>(from[i] * factor));
        return true;
    }
};

}  // namespace
}  // namespace detr_fast

void detr_fast_conv_int8_cpu(const detr_fast_conv* shape, const uint8_t* x, const int8_t* packed,
                             const detr_fast_int8_result* result, int instructions, int threads) {
    using namespace detr_fast;
    constexpr int64_t most_bytes = 384 * 1024;  // of gathered rows, which stay in L2 beside a panel
    const Int8Layer layer{*shape, x, packed, *result};
    const int64_t most = std::clamp<int64_t>(most_bytes / layer.depth() / int8_rows, 1, 8);
    const int64_t tiles = (layer.pixels() + int8_rows - 1) / int8_rows;
    const auto chosen = std::min(static_cast<Int8Instructions>(instructions), fastest_int8_instructions());
    const int64_t blocks = (tiles + most * threads - 1) / (most * threads) * threads;
    parallel_for(blocks, threads, [&](int64_t block) {
        const Int8Products products(chosen);
        const int64_t first = tiles * block / blocks * int8_rows;
        run_block(layer, products, first, std::min(tiles * (block + 1) / blocks * int8_rows, layer.pixels()));
    });
}

int detr_fast_int8_instructions() {
    return detr_fast::fastest_int8_instructions();
}

void detr_fast_to_bytes_cpu(const float* from, int64_t count, float factor, uint8_t* to, int threads) {
    using namespace detr_fast;
    constexpr int64_t at_once = 1 << 16;
    parallel_for((count + at_once - 1) / at_once, threads, [&](int64_t i) {
        const int64_t first = i * at_once;
        with_widest_vectors(ToBytesTask{from + first, std::min(at_once, count - first), factor, to + first});
    });
}
