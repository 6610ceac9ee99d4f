// Convolution as one matrix product whose left rows are the pixels under every weight of the kernel, read where they
// lie (the indirect convolution of Dukhan 2019).

#include "conv.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemm_tile.h"
#include "thread_pool.h"
#include "widths.h"

namespace detr_fast {
namespace {

struct Layer {
    const detr_fast_conv& shape;
    const float* x;
    const float* packed;
    const float* bias;  // of whole panels, as zeros
    const float* residual;
    const float* zeros;  // of `channels`: pixels outside of the map
    bool relu;
    float* out;

    int64_t taps() const { return shape.kernel_height * shape.kernel_width; }
    int64_t pixels() const { return shape.batch * shape.out_height * shape.out_width; }
};

// Where the pixels lie whose sum is one of the result's pixels, for the rows of a tile.
template <int rows>
class Addresses {
  public:
    explicit Addresses(const Layer& layer) : layer_(layer), left_(layer.taps() * rows) {}

    // Of the result's pixels `first` to `first + count - 1`; rows beyond them repeat the last.
    void place(int64_t first, int64_t count) {
        const auto& s = layer_.shape;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t pixel = first + std::min(r, count - 1);
            const int64_t row = pixel / s.out_width, image = row / s.out_height;
            const int64_t top = row % s.out_height * s.stride - s.padding;
            const int64_t left = pixel % s.out_width * s.stride - s.padding;
            const float* const map = layer_.x + image * s.height * s.width * s.channels;
            const float** to = left_.data() + r;
            for (int64_t i = 0; i < s.kernel_height; ++i) {
                const int64_t y = top + i * s.dilation;
                for (int64_t j = 0; j < s.kernel_width; ++j, to += rows) {
                    const int64_t x = left + j * s.dilation;
                    const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
                    *to = inside ? map + (y * s.width + x) * s.channels : layer_.zeros;
                }
            }
        }
    }

    const float* const* of_taps() const { return left_.data(); }

  private:
    const Layer& layer_;
    std::vector<const float*> left_;  // [taps, rows]
};

// Pixels [first, end) of the result.
struct Pixels {
    const Layer& layer;
    int64_t first, end;

    template <int Bytes>
    bool run() const {
        Addresses<Tile<Bytes>::rows> addresses(layer);
        for (int64_t pixel = first; pixel < end; pixel += Tile<Bytes>::rows) {
            const int64_t count = std::min<int64_t>(Tile<Bytes>::rows, end - pixel);
            addresses.place(pixel, count);
            for (int64_t c = 0; c < layer.shape.out_channels; c += Tile<Bytes>::columns) {
                const bool whole = count == Tile<Bytes>::rows && c + Tile<Bytes>::columns <= layer.shape.out_channels;
                if (whole) whole_tile<Bytes>(addresses.of_taps(), pixel, c);
                if (!whole) part_of_tile<Bytes>(addresses.of_taps(), pixel, count, c);
            }
        }
        return true;
    }

    template <int Bytes>
    DETR_FAST_INLINE void whole_tile(const float* const* left, int64_t pixel, int64_t column) const {
        using Floats = typename Tile<Bytes>::Floats;
        constexpr int width = Registers<Bytes>::width;
        const int64_t step = layer.shape.out_channels, place = pixel * step + column;
        const float* const bias = layer.bias + column;
        const float* const residual = layer.residual;
        float* const out = layer.out + place;
        const auto start = [&](auto r, auto v) DETR_FAST_LAMBDA {
            Floats sum = load_as<Floats>(bias + v * width);
            if (residual != nullptr) sum += load_as<Floats>(residual + place + r * step + v * width);
            return sum;
        };
        const Floats lowest = Floats{} + (layer.relu ? 0.0f : -__builtin_inff());
        const auto finish = [&](auto r, auto v, const Floats& sum)
                                DETR_FAST_LAMBDA { store_as(out + r * step + v * width, sum < lowest ? lowest : sum); };
        multiply<Bytes>(left, column, start, finish);
    }

    // The last pixels or columns: the tile goes to memory, and of that what there is to the result.
    template <int Bytes>
    DETR_FAST_INLINE void part_of_tile(const float* const* left, int64_t pixel, int64_t count, int64_t column) const {
        using Floats = typename Tile<Bytes>::Floats;
        constexpr int width = Registers<Bytes>::width, columns = Tile<Bytes>::columns;
        alignas(64) float tile[Tile<Bytes>::rows * columns];
        const float* const bias = layer.bias + column;
        multiply<Bytes>(
            left, column, [&](auto, auto v) DETR_FAST_LAMBDA { return load_as<Floats>(bias + v * width); },
            [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA { store_as(tile + r * columns + v * width, sum); });
        const int64_t step = layer.shape.out_channels;
        for (int64_t r = 0; r < count; ++r) {
            const int64_t place = (pixel + r) * step + column;
            for (int64_t c = 0; c < std::min<int64_t>(columns, step - column); ++c) {
                float sum = tile[r * columns + c];
                if (layer.residual != nullptr) sum += layer.residual[place + c];
                layer.out[place + c] = layer.relu && sum < 0.0f ? 0.0f : sum;
            }
        }
    }

    template <int Bytes, typename Start, typename Finish>
    DETR_FAST_INLINE void multiply(const float* const* left, int64_t column, const Start& start,
                                   const Finish& finish) const {
        const int64_t taps = layer.taps(), depth = layer.shape.channels;
        const float* const panel = layer.packed + column / panel_columns * panel_columns * taps * depth;
        multiply_tile<Bytes>(left, taps, depth, panel + column % panel_columns, start, finish);
    }
};

}  // namespace
}  // namespace detr_fast

int64_t detr_fast_conv_packed_floats(const detr_fast_conv* shape) {
    return detr_fast::packed_floats(shape->kernel_height * shape->kernel_width * shape->channels, shape->out_channels);
}

void detr_fast_conv_pack(const detr_fast_conv* shape, const float* weight, float* packed) {
    const int64_t taps = shape->kernel_height * shape->kernel_width, channels = shape->channels;
    // In the order in which the sums are formed: weight by weight of the kernel, all channels of each.
    std::vector<float> by_tap(static_cast<size_t>(taps * channels * shape->out_channels));
    for (int64_t k = 0; k < shape->out_channels; ++k) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t t = 0; t < taps; ++t) {
                by_tap[(k * taps + t) * channels + c] = weight[(k * channels + c) * taps + t];
            }
        }
    }
    const int64_t depth = taps * channels;
    detr_fast::pack_panels(by_tap.data(), depth, shape->out_channels, 1, depth, packed);
}

void detr_fast_conv_cpu(const detr_fast_conv* shape, const float* x, const float* packed, const float* bias,
                        const float* residual, bool relu, float* out, int threads) {
    using namespace detr_fast;
    std::vector<float> zeros(static_cast<size_t>(shape->channels));
    std::vector<float> whole_bias(static_cast<size_t>(panels_of(shape->out_channels) * panel_columns));
    if (bias != nullptr) std::copy_n(bias, shape->out_channels, whole_bias.data());
    const Layer layer{*shape, x, packed, whole_bias.data(), residual, zeros.data(), relu, out};
    const int64_t pixels = layer.pixels(), block = 48;
    parallel_for((pixels + block - 1) / block, threads, [&](int64_t task) {
        with_widest_vectors(Pixels{layer, task * block, std::min((task + 1) * block, pixels)});
    });
}
