// Winograd's algorithm where there are few channels: weights are transformed once, and a thread takes a block of
// patches from their inputs to their outputs.

#pragma once

#include <cstdint>

#include "thread_pool.h"
#include "widths.h"
#include "winograd_patches.h"
#include "winograd_weights.h"

namespace detr_fast {
namespace winograd {

inline int64_t weights_floats(const detr_fast_conv& shape) {
    return positions * packed_floats(shape.channels, shape.out_channels);
}

// Transformed weights of 128 channels, 2.4 MB, are read from the second cache by every block of patches.
inline bool has_few_channels(const detr_fast_conv& shape) {
    constexpr int64_t most_weights = 640 * 1024;  // floats
    return weights_floats(shape) <= most_weights;
}

// Row after row of a panel's positions: [36, panels, channels, 64].
struct WeightsTask {
    const detr_fast_conv& shape;
    const float* packed;
    int64_t number;  // 6 * panel + row
    float* weights;

    template <int Bytes>
    bool run() const {
        const int64_t channels = shape.channels, panel = number / inputs;
        const int64_t position_step = packed_floats(channels, shape.out_channels);
        const float* const from = packed + panel * 9 * channels * panel_columns;
        float* const to = weights + panel * channels * panel_columns;
        unrolled<inputs>([&](auto row) DETR_FAST_LAMBDA {
            if (number % inputs != row) return;
            transform_weights<Bytes, row>(from, channels, to + row * inputs * position_step, position_step);
        });
        return true;
    }
};

// weights has weights_floats.
inline void transform_all_weights(const detr_fast_conv& shape, const float* packed, float* weights, int threads) {
    parallel_for(inputs * panels_of(shape.out_channels), threads,
                 [&](int64_t number) { with_widest_vectors(WeightsTask{shape, packed, number, weights}); });
}

// Of `count` patches at one position: left [count, padded channels], panel the position's weights, and to
// [count, padded out channels].
template <int Bytes>
DETR_FAST_INLINE void multiply_position(const detr_fast_conv& shape, int64_t count, const float* left,
                                        const float* panel, float* to) {
    const int64_t channels = shape.channels, left_step = padded(channels), to_step = padded(shape.out_channels);
    const int64_t tiles = (count + Tile<Bytes>::rows - 1) / Tile<Bytes>::rows;
    for (int64_t k = 0; k < to_step; k += Tile<Bytes>::columns) {
        const int64_t before = k / panel_columns * panel_columns, column = k - before;
        const float* const right = panel + before * channels + column;
        // Every tile of a panel fetches its part of the next one: layers of 64 channels take 4.4 ms then, not 4.9.
        const int64_t parts = tiles * (panel_columns / Tile<Bytes>::columns);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = tile * count / tiles, rows = (tile + 1) * count / tiles - row;
            const int64_t part = column / Tile<Bytes>::columns * tiles + tile;
            const NextPanel fetch(panel + (before + panel_columns) * channels, channels, part, parts);
            multiply_rows<Bytes>(rows, left + row * left_step, left_step, channels, right, to + row * to_step + k,
                                 to_step, fetch);
        }
    }
}

}  // namespace winograd
}  // namespace detr_fast
