// Patches of a map, from pixels to the numbers that Winograd's algorithm multiplies, and from products to pixels.

#pragma once

#include <algorithm>
#include <cstdint>

#include "conv.h"
#include "gemm_tile.h"
#include "winograd_lines.h"

namespace detr_fast {
namespace winograd {

struct Layer {
    const detr_fast_conv& shape;
    const float* x;
    const float* packed;
    const float* bias;
    const float* residual;
    const float* gate;
    bool relu;
    float* out;
};

// Patches are 4x4 outputs, and the 6x6 inputs around them, of one image. Where the convolution is dilated, their pixels
// are `dilation` apart.
struct Patch {
    int64_t image, top, left;  // of the first output
};

struct Patches {
    int64_t rows, columns, dilation, count;

    explicit Patches(const detr_fast_conv& shape)
        : rows(along(shape.height, shape.dilation)),
          columns(along(shape.width, shape.dilation)),
          dilation(shape.dilation) {
        count = shape.batch * dilation * dilation * rows * columns;
    }

    static int64_t along(int64_t pixels, int64_t dilation) {
        const int64_t apart = (pixels + dilation - 1) / dilation;
        return (apart + outputs - 1) / outputs;
    }

    Patch at(int64_t i) const {
        const int64_t column = i % columns, row = i / columns % rows, grid = i / (columns * rows);
        const int64_t top = grid / dilation % dilation, left = grid % dilation;
        return {grid / (dilation * dilation), top + row * outputs * dilation, left + column * outputs * dilation};
    }
};

inline int64_t padded(int64_t channels) {
    return panels_of(channels) * panel_columns;
}

template <int Bytes>
DETR_FAST_INLINE typename Registers<Bytes>::Floats load_first(const float* from, int64_t count) {
    if (count >= Registers<Bytes>::width) return load_as<typename Registers<Bytes>::Floats>(from);
    float numbers[Registers<Bytes>::width] = {};
    for (int64_t i = 0; i < count; ++i) numbers[i] = from[i];
    return load_as<typename Registers<Bytes>::Floats>(numbers);
}

template <int Bytes>
DETR_FAST_INLINE void store_first(float* to, const typename Registers<Bytes>::Floats& x, int64_t count) {
    if (count >= Registers<Bytes>::width) return store_as(to, x);
    float numbers[Registers<Bytes>::width];
    store_as(numbers, x);
    for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
}

// call(count) with a constant, for count from 1 to `most`.
template <int most, typename Call>
DETR_FAST_INLINE void with_constant(int64_t count, const Call& call) {
    if (count == most) return call(std::integral_constant<int, most>{});
    if constexpr (most > 1) with_constant<most - 1>(count, call);
}

// The 6x6 inputs pixel(row, column) of a patch at every position; positions lie `position_step` apart.
template <int Bytes, typename Pixel>
DETR_FAST_INLINE void transform_inputs(float* to, int64_t position_step, const Pixel& pixel) {
    using Floats = typename Registers<Bytes>::Floats;
    Floats rows[inputs][inputs];
    unrolled<inputs>([&](auto column) DETR_FAST_LAMBDA {
        Floats x[inputs], at[inputs];
        unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA { x[row] = pixel(row, column); });
        input_line(x, at);
        unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA { rows[row][column] = at[row]; });
    });
    unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA {
        Floats at[inputs];
        input_line(rows[row], at);
        unrolled<inputs>([&](auto column)
                             DETR_FAST_LAMBDA { store_as(to + (row * inputs + column) * position_step, at[column]); });
    });
}

// finish(row, column, sum) for each of a patch's 4x4 outputs; products of a position lie `position_step` apart.
template <int Bytes, typename Finish>
DETR_FAST_INLINE void transform_products(const float* from, int64_t position_step, const Finish& finish) {
    using Floats = typename Registers<Bytes>::Floats;
    Floats rows[outputs][inputs];
    unrolled<inputs>([&](auto column) DETR_FAST_LAMBDA {
        Floats at[inputs], y[outputs];
        unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA {
            at[row] = load_as<Floats>(from + (row * inputs + column) * position_step);
        });
        output_line(at, y);
        unrolled<outputs>([&](auto row) DETR_FAST_LAMBDA { rows[row][column] = y[row]; });
    });
    unrolled<outputs>([&](auto row) DETR_FAST_LAMBDA {
        Floats y[outputs];
        output_line(rows[row], y);
        unrolled<outputs>([&](auto column) DETR_FAST_LAMBDA { finish(row, column, y[column]); });
    });
}

// Numbers of a patch's 36 positions lie `position_step` apart.
template <int Bytes>
class PatchTransforms {
  public:
    using Floats = typename Registers<Bytes>::Floats;
    static constexpr int64_t width = Registers<Bytes>::width;

    DETR_FAST_INLINE explicit PatchTransforms(const Layer& layer)
        : layer_(layer), shape_(layer.shape), patches_(layer.shape) {}

    // to: the channels of a position behind one another, as many vectors as they begin.
    DETR_FAST_INLINE void inputs_of(int64_t number, float* to, int64_t position_step) const {
        const Patch patch = patches_.at(number);
        const int64_t d = shape_.dilation, top = patch.top - d, left = patch.left - d, reach = (inputs - 1) * d;
        const int64_t column_step = d * shape_.channels, row_step = shape_.width * column_step;
        const float* corner = layer_.x + ((patch.image * shape_.height + top) * shape_.width + left) * shape_.channels;
        const bool inside = top >= 0 && left >= 0 && top + reach < shape_.height && left + reach < shape_.width;
        const int64_t whole = inside ? shape_.channels / width * width : 0;
        for (int64_t c = 0; c < whole; c += width) {
            transform_inputs<Bytes>(to + c, position_step, [&](auto row, auto column) DETR_FAST_LAMBDA {
                return load_as<Floats>(corner + row * row_step + column * column_step + c);
            });
        }
        for (int64_t c = whole; c < shape_.channels; c += width) {
            // Between the branches the compiler would round other products than where there are none.
            alignas(64) float pixels[positions * width];
            for (int64_t i = 0; i < positions; ++i) {
                const int64_t row = i / inputs, column = i % inputs;
                const float* const pixel = corner + row * row_step + column * column_step + c;
                const bool is_there = inside || holds(top + row * d, left + column * d);
                store_as(pixels + i * width, is_there ? load_first<Bytes>(pixel, shape_.channels - c) : Floats{});
            }
            transform_inputs<Bytes>(to + c, position_step, [&](auto row, auto column) DETR_FAST_LAMBDA {
                return load_as<Floats>(pixels + (row * inputs + column) * width);
            });
        }
    }

    // from: products of the result's channels from `first` to `end`, whole vectors of them.
    DETR_FAST_INLINE void outputs_of(int64_t number, const float* from, int64_t position_step, int64_t first,
                                     int64_t end) const {
        const Patch patch = patches_.at(number);
        const int64_t d = shape_.dilation, column_step = d * shape_.out_channels, row_step = shape_.width * column_step;
        const int64_t corner =
            ((patch.image * shape_.height + patch.top) * shape_.width + patch.left) * shape_.out_channels;
        for (int64_t k = first; k < end; k += width, from += width) {
            const Floats bias =
                layer_.bias == nullptr ? Floats{} : load_first<Bytes>(layer_.bias + k, shape_.out_channels - k);
            transform_products<Bytes>(from, position_step, [&](auto row, auto column, Floats y) DETR_FAST_LAMBDA {
                if (!holds(patch.top + row * d, patch.left + column * d)) return;
                const int64_t pixel = corner + row * row_step + column * column_step + k;
                y += bias;
                if (layer_.residual != nullptr)
                    y += load_first<Bytes>(layer_.residual + pixel, shape_.out_channels - k);
                if (layer_.relu) y = y < 0.0f ? Floats{} : y;  // in this order NaN stays
                if (layer_.gate != nullptr)
                    y = load_first<Bytes>(layer_.gate + pixel, shape_.out_channels - k) <= 0.0f ? Floats{} : y;
                store_first<Bytes>(layer_.out + pixel, y, shape_.out_channels - k);
            });
        }
    }

  private:
    DETR_FAST_INLINE bool holds(int64_t y, int64_t x) const {
        return y >= 0 && x >= 0 && y < shape_.height && x < shape_.width;
    }

    const Layer& layer_;
    const detr_fast_conv& shape_;
    const Patches patches_;
};

// `count` left rows of all channels, position by position, with a panel's weights at one position.
template <int Bytes, typename Meanwhile>
DETR_FAST_INLINE void multiply_rows(int64_t count, const float* left, int64_t left_step, int64_t depth,
                                    const float* panel, float* to, int64_t to_step, const Meanwhile& meanwhile) {
    using Floats = typename Registers<Bytes>::Floats;
    constexpr int64_t width = Registers<Bytes>::width;
    with_constant<Tile<Bytes>::rows>(count, [&](auto rows) DETR_FAST_LAMBDA {
        const float* row[rows];
        unrolled<rows>([&](auto r) DETR_FAST_LAMBDA { row[r] = left + r * left_step; });
        multiply_tile<Bytes, rows>(
            row, 1, depth, panel, [](auto, auto) DETR_FAST_LAMBDA { return Floats{}; },
            [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA { store_as(to + r * to_step + v * width, sum); },
            meanwhile);
    });
}

}  // namespace winograd
}  // namespace detr_fast
