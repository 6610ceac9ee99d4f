// What the layers of a transformer do with rows of tokens: products with packed weights, and norms.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gemm_tile.h"
#include "widths.h"

namespace detr_fast {

// out = x * weight + bias + added, the higher of that and 0 with `relu`; bias and added may be null, added may be out.
// `weight` are panels of which every one has panel_depth rows, the first `depth` of them to be multiplied, and the
// columns are whole panels.
struct RowProduct {
    const float* x;
    int64_t x_step, rows, depth;
    const float* weight;
    int64_t panel_depth, columns;
    const float* bias;
    const float* added;
    int64_t added_step;
    bool relu;
    float* out;
    int64_t out_step;

    template <int Bytes>
    DETR_FAST_INLINE bool run() const {
        constexpr int most = Tile<Bytes>::rows;
        const int64_t tiles = (rows + most - 1) / most, parts = panel_columns / Tile<Bytes>::columns;
        for (int64_t c = 0; c < columns; c += Tile<Bytes>::columns) {
            const float* const panel = weight + c / panel_columns * panel_depth * panel_columns;
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t part = c % panel_columns / Tile<Bytes>::columns * tiles + tile;
                const NextPanel next(panel + panel_depth * panel_columns, depth, part, parts * tiles);
                const int64_t first = tile * most, count = std::min<int64_t>(most, rows - first);
                // A tile of exactly the rows that there are, so that any division among threads is an even one.
                unrolled<most>([&](auto n) DETR_FAST_LAMBDA {
                    if (count == n + 1) run_tile<Bytes, n + 1>(first, c, panel + c % panel_columns, next);
                });
            }
        }
        return true;
    }

  private:
    template <int Bytes, int count>
    DETR_FAST_INLINE void run_tile(int64_t first, int64_t column, const float* panel, const NextPanel& next) const {
        using Floats = typename Tile<Bytes>::Floats;
        constexpr int width = Registers<Bytes>::width;
        const float* left[count];
        for (int r = 0; r < count; ++r) left[r] = x + (first + r) * x_step;
        const Floats lowest = Floats{} + (relu ? 0.0f : -__builtin_inff());
        multiply_tile<Bytes, count>(
            left, 1, depth, panel, [](auto, auto) DETR_FAST_LAMBDA { return Floats{}; },
            [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA {
                const int64_t row = first + r, place = column + v * width;
                Floats y = sum;
                if (bias != nullptr) y += load_as<Floats>(bias + place);
                if (added != nullptr) y += load_as<Floats>(added + row * added_step + place);
                store_as(out + row * out_step + place, y < lowest ? lowest : y);
            },
            next);
    }
};

// out = the layer norm of x, and out_pos the same with positions, of which row i takes row (first_pos + i) % pos_rows;
// all [rows, columns], columns a multiple of 64. out may be x; out_pos may be null.
struct RowNorm {
    const float* x;
    int64_t rows, columns;
    const float *weight, *bias;
    double eps;
    float* out;
    const float* pos;
    int64_t first_pos, pos_rows;
    float* out_pos;

    template <int Bytes>
    DETR_FAST_INLINE bool run() const {
        using Floats = typename Registers<Bytes>::Floats;
        for (int64_t i = 0; i < rows; ++i) {
            const float* const row = x + i * columns;
            const float mean =
                sum<Bytes>([&](int64_t c) DETR_FAST_LAMBDA { return load_as<Floats>(row + c); }) / columns;
            // The mean is subtracted before squares are summed, see add_layer_norm.cpp.
            const float squares = sum<Bytes>([&](int64_t c) DETR_FAST_LAMBDA {
                const Floats d = load_as<Floats>(row + c) - mean;
                return d * d;
            });
            const float rstd = 1.0f / std::sqrt(squares / columns + static_cast<float>(eps));
            const float* const place = out_pos == nullptr ? nullptr : pos + (first_pos + i) % pos_rows * columns;
            for (int64_t c = 0; c < columns; c += Registers<Bytes>::width) {
                const Floats normal = (load_as<Floats>(row + c) - mean) * rstd;
                const Floats y = normal * load_as<Floats>(weight + c) + load_as<Floats>(bias + c);
                store_as(out + i * columns + c, y);
                if (place != nullptr) store_as(out_pos + i * columns + c, y + load_as<Floats>(place + c));
            }
        }
        return true;
    }

  private:
    // Of all columns, in four sums that do not wait for one another.
    template <int Bytes, typename Number>
    DETR_FAST_INLINE float sum(const Number& number) const {
        using Floats = typename Registers<Bytes>::Floats;
        constexpr int width = Registers<Bytes>::width, sums = 4;
        Floats part[sums];
        unrolled<sums>([&](auto s) DETR_FAST_LAMBDA { part[s] = Floats{}; });
        for (int64_t c = 0; c < columns; c += sums * width) {
            unrolled<sums>([&](auto s) DETR_FAST_LAMBDA { part[s] += number(c + s * width); });
        }
        const Floats all = (part[0] + part[1]) + (part[2] + part[3]);
        float lane[width], total = 0;
        store_as(lane, all);
        for (const float each : lane) total += each;
        return total;
    }
};

}  // namespace detr_fast
