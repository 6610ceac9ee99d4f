// A convolution's weight as its packed forms are made of it: with a factor for each channel, and for the convolution
// that takes gradients back.

#pragma once

#include <algorithm>
#include <cstdint>

#include "conv.h"
#include "gemm_tile.h"

namespace detr_fast {

// Taps of some input channels of a panel of output channels, [channels, taps, panel_columns], zeros beyond the last
// output channel. With these sizes they stay in the first cache while they are transposed.
class WeightBlock {
  public:
    static constexpr int64_t most_rows = 72;

    explicit WeightBlock(const detr_fast_conv& shape)
        : taps_(shape.kernel_height * shape.kernel_width),
          channels_(shape.channels),
          out_channels_(shape.out_channels),
          at_once_(std::max<int64_t>(1, most_rows / taps_)) {}

    int64_t floats() const { return at_once_ * taps_ * panel_columns; }
    int64_t blocks_of_panel() const { return (channels_ + at_once_ - 1) / at_once_; }
    int64_t first_channel(int64_t block) const { return block * at_once_; }
    int64_t end_channel(int64_t block) const { return std::min(channels_, (block + 1) * at_once_); }

    void gather(const detr_fast_conv_weight& from, int64_t panel, int64_t block, float* to) const {
        const int64_t first = panel * panel_columns, outs = std::min(panel_columns, out_channels_ - first);
        const int64_t begin = first_channel(block), end = end_channel(block), rows = (end - begin) * taps_;
        if (outs < panel_columns) std::fill(to, to + rows * panel_columns, 0.0f);
        for (int64_t column = 0; column < outs; ++column) {
            const int64_t out = first + column;
            if (!from.adjoint) {
                const float factor = from.scale == nullptr ? 1.0f : from.scale[out];
                const float* taps = from.weight + (out * channels_ + begin) * taps_;
                for (int64_t row = 0; row < rows; ++row) to[row * panel_columns + column] = factor * taps[row];
                continue;
            }
            for (int64_t channel = begin; channel < end; ++channel) {
                const float factor = from.scale == nullptr ? 1.0f : from.scale[channel];
                const float* taps = from.weight + (channel * out_channels_ + out) * taps_;
                float* row = to + (channel - begin) * taps_ * panel_columns + column;
                for (int64_t t = 0; t < taps_; ++t) row[t * panel_columns] = factor * taps[taps_ - 1 - t];
            }
        }
    }

  private:
    const int64_t taps_, channels_, out_channels_, at_once_;
};

}  // namespace detr_fast
