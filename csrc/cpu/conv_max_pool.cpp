// A band of the result's rows after the other. Rows of the image are padded and their channels laid side by side once,
// so that what a row of the kernel covers is contiguous even where there are 3 channels. Of the convolution's map only
// the three rows that are pooled are ever held, which fit in L2.

#include "conv_max_pool.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemm_tile.h"
#include "memory_use.h"
#include "thread_pool.h"
#include "widths.h"

namespace detr_fast {
namespace {

struct Stem {
    const detr_fast_conv& shape;
    const float* x;
    const int64_t* strides;
    const float* packed;
    const float* bias;  // of whole panels
    float* out;

    int64_t pooled_height() const { return (shape.out_height + 1) / 2; }
    int64_t pooled_width() const { return (shape.out_width + 1) / 2; }
    int64_t padded_columns() const { return panels_of(shape.out_channels) * panel_columns; }
    // Floats of a padded row of the image. The last tile's rows beyond the map stay within the kernel's reach.
    int64_t row_floats() const { return ((shape.out_width - 1) * shape.stride + shape.kernel_width) * shape.channels; }
};

// What a thread works in.
struct Rows {
    std::vector<float> image;        // a ring of kernel_height padded rows
    std::vector<float> conv;         // a ring of 3 rows [out_width, padded_columns]
    std::vector<const float*> left;  // [kernel_height, a tile's rows]
    KeptMemory use;
};

template <int Bytes>
class Band {
  public:
    Band(const Stem& stem, Rows& rows) : stem_(stem), s_(stem.shape), rows_(rows) {
        rows_.image.resize(static_cast<size_t>(s_.kernel_height * stem.row_floats()));
        rows_.conv.resize(static_cast<size_t>(3 * s_.out_width * stem.padded_columns()));
        rows_.left.resize(static_cast<size_t>(s_.kernel_height * tile_rows));
        rows_.use.worked_in((rows_.image.size() + rows_.conv.size()) * sizeof(float));
    }

    // Rows [first, end) of an image's result.
    DETR_FAST_INLINE void run(int64_t image, int64_t first, int64_t end) {
        int64_t done = std::max<int64_t>(0, 2 * first - 1);  // the convolution's next row
        next_row_ = done * s_.stride - s_.padding;
        for (int64_t row = first; row < end; ++row) {
            for (const int64_t last = std::min(2 * row + 2, s_.out_height); done < last; ++done) {
                lay_out(image, done);
                convolve(done);
            }
            pool(row, stem_.out + (image * stem_.pooled_height() + row) * stem_.pooled_width() * s_.out_channels);
        }
    }

  private:
    using Floats = typename Tile<Bytes>::Floats;
    using Bits = typename Registers<Bytes>::Bits;
    static constexpr int tile_rows = Tile<Bytes>::rows, width = Registers<Bytes>::width;

    float* image_row(int64_t y) {
        return rows_.image.data() + (y + s_.padding) % s_.kernel_height * stem_.row_floats();
    }
    float* conv_row(int64_t y) { return rows_.conv.data() + y % 3 * s_.out_width * stem_.padded_columns(); }

    // The rows of the image that a row of the convolution needs and that are not there yet.
    DETR_FAST_INLINE void lay_out(int64_t image, int64_t conv_row) {
        const int64_t top = conv_row * s_.stride - s_.padding;
        for (next_row_ = std::max(next_row_, top); next_row_ < top + s_.kernel_height; ++next_row_) {
            float* const to = image_row(next_row_);
            std::fill_n(to, stem_.row_floats(), 0.0f);
            if (next_row_ < 0 || next_row_ >= s_.height) continue;
            const float* const from = stem_.x + image * stem_.strides[0] + next_row_ * stem_.strides[2];
            const int64_t columns = std::min(s_.width, stem_.row_floats() / s_.channels - s_.padding);
            for (int64_t c = 0; c < s_.channels; ++c) {
                const float* const channel = from + c * stem_.strides[1];
                float* const place = to + s_.padding * s_.channels + c;
                for (int64_t x = 0; x < columns; ++x) place[x * s_.channels] = channel[x * stem_.strides[3]];
            }
        }
    }

    DETR_FAST_INLINE void convolve(int64_t y) {
        float* const to = conv_row(y);
        const int64_t step = stem_.padded_columns(), depth = s_.kernel_width * s_.channels;
        const int64_t top = y * s_.stride - s_.padding;
        for (int64_t x = 0; x < s_.out_width; x += tile_rows) {
            // The row's last pixels are computed again where they do not fill a tile.
            const int64_t first = std::max<int64_t>(0, std::min(x, s_.out_width - tile_rows));
            for (int64_t i = 0; i < s_.kernel_height; ++i) {
                for (int64_t r = 0; r < tile_rows; ++r) {
                    const int64_t column = std::min(first + r, s_.out_width - 1);
                    rows_.left[i * tile_rows + r] = image_row(top + i) + column * s_.stride * s_.channels;
                }
            }
            const int64_t count = std::min<int64_t>(tile_rows, s_.out_width);
            const Floats zero{};
            for (int64_t c = 0; c < step; c += Tile<Bytes>::columns) {
                const float* const bias = stem_.bias + c;
                const float* const panel =
                    stem_.packed + c / panel_columns * panel_columns * s_.kernel_height * depth + c % panel_columns;
                multiply_tile<Bytes>(
                    rows_.left.data(), s_.kernel_height, depth, panel,
                    [&](auto, auto v) DETR_FAST_LAMBDA { return load_as<Floats>(bias + v * width); },
                    [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA {
                        const Floats positive = (sum < zero ? zero : sum) + 0.0f;  // no -0
                        if (r < count) store_as(to + (first + r) * step + c + v * width, positive);
                    });
            }
        }
    }

    // Numbers are compared by their bits, which order those from 0 on as they do themselves, and NaN of either sign,
    // which must stay, above all.
    DETR_FAST_INLINE void pool(int64_t row, float* to) {
        const int64_t step = stem_.padded_columns();
        const int64_t top = std::max<int64_t>(0, 2 * row - 1), bottom = std::min(2 * row + 2, s_.out_height);
        for (int64_t column = 0; column < stem_.pooled_width(); ++column, to += s_.out_channels) {
            const int64_t left = std::max<int64_t>(0, 2 * column - 1), right = std::min(2 * column + 2, s_.out_width);
            for (int64_t c = 0; c < s_.out_channels; c += width) {
                Bits highest{};
                for (int64_t y = top; y < bottom; ++y) {
                    const float* const pixels = conv_row(y) + c;
                    for (int64_t x = left; x < right; ++x) {
                        const Bits number = load_as<Bits>(pixels + x * step);
                        highest = highest > number ? highest : number;
                    }
                }
                if (c + width <= s_.out_channels) {
                    store_as(to + c, highest);
                } else {
                    std::memcpy(to + c, &highest, static_cast<size_t>(s_.out_channels - c) * sizeof(float));
                }
            }
        }
    }

    const Stem& stem_;
    const detr_fast_conv& s_;
    Rows& rows_;
    int64_t next_row_ = 0;  // of the image, to be laid out
};

struct BandTask {
    const Stem& stem;
    Rows& rows;
    int64_t image, first, end;

    template <int Bytes>
    bool run() const {
        Band<Bytes>(stem, rows).run(image, first, end);
        return true;
    }
};

}  // namespace
}  // namespace detr_fast

void detr_fast_conv_max_pool_cpu(const detr_fast_conv* shape, const float* x, const int64_t strides[4],
                                 const float* packed, const float* bias, float* out, int threads) {
    using namespace detr_fast;
    std::vector<float> whole_bias(static_cast<size_t>(panels_of(shape->out_channels) * panel_columns));
    if (bias != nullptr) std::copy_n(bias, shape->out_channels, whole_bias.data());
    const Stem stem{*shape, x, strides, packed, whole_bias.data(), out};
    // A band computes one row of the convolution again, of two for each of its own.
    constexpr int64_t most_rows = 25;
    const int64_t height = stem.pooled_height();
    const int64_t bands = std::max((height + most_rows - 1) / most_rows, std::min<int64_t>(threads, height));
    parallel_for(shape->batch * bands, threads, [&](int64_t task) {
        static thread_local Rows rows;
        const int64_t image = task / bands, band = task % bands;
        with_widest_vectors(BandTask{stem, rows, image, height * band / bands, height * (band + 1) / bands});
    });
}
