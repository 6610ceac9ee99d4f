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
    const float* gate;
    const float* zeros;  // of `channels`: pixels outside of the map
    bool relu;
    float* out;

    int64_t taps() const { return shape.kernel_height * shape.kernel_width; }
    int64_t pixels() const { return shape.batch * shape.out_height * shape.out_width; }
};

// A panel's part for the taps that are multiplied at once should stay in L2 beside the pixels that it meets.
constexpr int64_t most_depth = 1024;
constexpr int64_t most_input = 96 * 1024;  // floats
constexpr int64_t most_rows = 192;

// Tiles fetch what the next ones need. Up to this depth that is pixels, beyond it weights: layers of 64 to 256 channels
// take 0.73 to 0.95 of their time so, of 1024 and 2048 channels 0.82 to 0.98.
constexpr int64_t most_depth_of_pixels = 256;

// Where the pixels lie whose weighted sum is a pixel of the result, for every tap and each of a tile's rows.
void place_tile(const Layer& layer, int64_t first, int64_t count, int64_t rows, const float** left) {
    const auto& s = layer.shape;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t pixel = first + std::min(r, count - 1);  // rows beyond the last pixel repeat it
        const int64_t row = pixel / s.out_width, image = row / s.out_height;
        const int64_t top = row % s.out_height * s.stride - s.padding;
        const int64_t start = pixel % s.out_width * s.stride - s.padding;
        const float* const map = layer.x + image * s.height * s.width * s.channels;
        const float** to = left + r;
        for (int64_t i = 0; i < s.kernel_height; ++i) {
            const int64_t y = top + i * s.dilation;
            for (int64_t j = 0; j < s.kernel_width; ++j, to += rows) {
                const int64_t x = start + j * s.dilation;
                const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
                *to = inside ? map + (y * s.width + x) * s.channels : layer.zeros;
            }
        }
    }
}

// Pixels [first, end) of the result, in some of its columns: for some taps at a time and a panel after the other, so
// that what a panel holds for these taps meets all of the pixels while it is near.
template <int Bytes>
class Block {
  public:
    Block(const Layer& layer, int64_t first, int64_t end, const float** left)
        : layer_(layer), first_(first), end_(end), left_(left) {}

    DETR_FAST_INLINE void run(int64_t first_column, int64_t end_column) {
        const int64_t taps = layer_.taps();
        const int64_t at_once = std::max<int64_t>(1, most_depth / layer_.shape.channels);
        for (int64_t p = first_; p < end_; p += rows) {
            place_tile(layer_, p, std::min<int64_t>(rows, end_ - p), rows, left_ + (p - first_) * taps);
        }
        for (tap_ = 0; tap_ < taps; tap_ += at_once) {
            taps_ = std::min(at_once, taps - tap_);
            for (int64_t c = first_column; c < end_column; c += Tile<Bytes>::columns) {
                for (int64_t p = first_; p < end_; p += rows) {
                    const int64_t row_count = std::min<int64_t>(rows, end_ - p);
                    const int64_t column_count = std::min<int64_t>(Tile<Bytes>::columns, end_column - c);
                    const bool whole = row_count == rows && column_count == Tile<Bytes>::columns;
                    if (whole) whole_tile(p, c);
                    if (!whole) part_of_tile(p, row_count, c, column_count);
                }
            }
        }
    }

  private:
    using Floats = typename Tile<Bytes>::Floats;
    static constexpr int rows = Tile<Bytes>::rows, width = Registers<Bytes>::width;

    bool is_first() const { return tap_ == 0; }
    bool is_last() const { return tap_ + taps_ == layer_.taps(); }

    DETR_FAST_INLINE void whole_tile(int64_t pixel, int64_t column) const {
        const int64_t step = layer_.shape.out_channels, place = pixel * step + column;
        const float* const bias = layer_.bias + column;
        const float* const added = is_first() ? layer_.residual : layer_.out;
        float* const out = layer_.out + place;
        // Sums that are formed at once begin with 0: while they are small, so are their rounding errors.
        const bool at_once = is_first() && is_last();
        const auto addend = [&](auto r, auto v) DETR_FAST_LAMBDA {
            Floats sum = is_first() ? load_as<Floats>(bias + v * width) : Floats{};
            if (added != nullptr) sum += load_as<Floats>(added + place + r * step + v * width);
            return sum;
        };
        const Floats lowest = Floats{} + (layer_.relu && is_last() ? 0.0f : -__builtin_inff());
        const auto start = [&](auto r, auto v) DETR_FAST_LAMBDA { return at_once ? Floats{} : addend(r, v); };
        const float* const gate = is_last() && layer_.gate != nullptr ? layer_.gate + place : nullptr;
        const auto finish = [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA {
            const int64_t at = r * step + v * width;
            Floats y = at_once ? sum + addend(r, v) : sum;
            y = y < lowest ? lowest : y;
            if (gate != nullptr) y = load_as<Floats>(gate + at) <= 0.0f ? Floats{} : y;
            store_as(out + at, y);
        };
        if (depth() <= most_depth_of_pixels) return multiply(pixel, column, start, finish, next_tile(pixel, column));
        multiply(pixel, column, start, finish, next_panel(pixel, column));
    }

    // Few products for every number: what keeps a tile waiting is the map and the result.
    DETR_FAST_INLINE NextTile next_tile(int64_t pixel, int64_t column) const {
        const auto& s = layer_.shape;
        // Only the first panel meets pixels that are not near yet.
        const bool reads = column == 0 && layer_.taps() == 1 && s.stride == 1;
        const float* const x = layer_.x + (pixel + rows) * s.channels;
        const float* const out = layer_.out + (pixel + rows) * s.out_channels + column;
        return {x, reads ? rows * s.channels : 0, out, s.out_channels, Tile<Bytes>::columns, is_first() ? rows : 0};
    }

    // Many: it is the weights.
    DETR_FAST_INLINE NextPanel next_panel(int64_t pixel, int64_t column) const {
        const int64_t tiles = (end_ - first_ + rows - 1) / rows, tile = (pixel - first_) / rows;
        const int64_t part = column % panel_columns / Tile<Bytes>::columns * tiles + tile;
        const float* const next = panel(column) + layer_.taps() * layer_.shape.channels * panel_columns;
        return {next, depth(), part, panel_columns / Tile<Bytes>::columns * tiles};
    }

    // The last pixels or columns: the tile goes to memory, and of that what there is to the result.
    DETR_FAST_INLINE void part_of_tile(int64_t pixel, int64_t row_count, int64_t column, int64_t column_count) const {
        constexpr int columns = Tile<Bytes>::columns;
        alignas(64) float tile[rows * columns];
        const float* const bias = layer_.bias + column;
        multiply(
            pixel, column, [&](auto, auto) DETR_FAST_LAMBDA { return Floats{}; },
            [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA { store_as(tile + r * columns + v * width, sum); });
        const float* const added = is_first() ? layer_.residual : layer_.out;
        for (int64_t r = 0; r < row_count; ++r) {
            const int64_t place = (pixel + r) * layer_.shape.out_channels + column;
            for (int64_t c = 0; c < column_count; ++c) {
                float addend = is_first() ? bias[c] : 0.0f;
                if (added != nullptr) addend += added[place + c];
                const float sum = tile[r * columns + c] + addend;
                const bool closed = layer_.gate != nullptr && layer_.gate[place + c] <= 0.0f;
                const bool none = (layer_.relu && sum < 0.0f) || closed;
                layer_.out[place + c] = is_last() && none ? 0.0f : sum;
            }
        }
    }

    template <typename Start, typename Finish, typename Meanwhile = Nothing>
    DETR_FAST_INLINE void multiply(int64_t pixel, int64_t column, const Start& start, const Finish& finish,
                                   const Meanwhile& meanwhile = {}) const {
        multiply_tile<Bytes>(left_ + (pixel - first_) * layer_.taps() + tap_ * rows, taps_, layer_.shape.channels,
                             panel(column) + column % panel_columns, start, finish, meanwhile);
    }

    // Numbers of a panel that are multiplied at once, and where they begin.
    int64_t depth() const { return taps_ * layer_.shape.channels; }
    const float* panel(int64_t column) const {
        const int64_t taps = layer_.taps(), first = column / panel_columns * taps + tap_;
        return layer_.packed + first * layer_.shape.channels * panel_columns;
    }

    const Layer& layer_;
    int64_t first_, end_;
    const float** left_;  // [tiles, taps, rows]
    int64_t tap_ = 0, taps_ = 0;
};

struct BlockTask {
    const Layer& layer;
    int64_t first, end, first_column, end_column;
    const float** left;

    template <int Bytes>
    bool run() const {
        Block<Bytes>(layer, first, end, left).run(first_column, end_column);
        return true;
    }
};

// Whole tiles of every width, and as many blocks for each thread. Where there are more columns than pixels each thread
// has columns of its own, so that no two read the same weights.
struct Division {
    static constexpr int64_t rows = 6;
    int64_t tiles, panels, blocks, groups = 1;

    Division(const Layer& layer, int threads)
        : tiles((layer.pixels() + rows - 1) / rows), panels(panels_of(layer.shape.out_channels)) {
        const int64_t most = std::clamp<int64_t>(most_input / layer.shape.channels, 48, most_rows) / rows;
        if (layer.shape.out_channels > layer.pixels()) groups = std::min<int64_t>(panels, threads);
        const int64_t share = groups == 1 ? threads : 1;
        blocks = (tiles + most * share - 1) / (most * share) * share;
    }
    int64_t first_pixel(int64_t block) const { return tiles * block / blocks * rows; }
    int64_t first_column(int64_t group) const { return panels * group / groups * panel_columns; }
};

}  // namespace
}  // namespace detr_fast

void detr_fast_conv_cpu(const detr_fast_conv* shape, const float* x, const float* packed, const float* bias,
                        const float* residual, const float* gate, bool relu, float* out, int threads) {
    using namespace detr_fast;
    std::vector<float> zeros(static_cast<size_t>(shape->channels));
    std::vector<float> whole_bias(static_cast<size_t>(panels_of(shape->out_channels) * panel_columns));
    if (bias != nullptr) std::copy_n(bias, shape->out_channels, whole_bias.data());
    const Layer layer{*shape, x, packed, whole_bias.data(), residual, gate, zeros.data(), relu, out};
    const Division division(layer, threads);
    parallel_for(division.groups * division.blocks, threads, [&](int64_t task) {
        static thread_local std::vector<const float*> left;
        const int64_t group = task / division.blocks, block = task % division.blocks;
        const int64_t first = division.first_pixel(block);
        const int64_t end = std::min(division.first_pixel(block + 1), layer.pixels());
        const int64_t end_column = std::min(division.first_column(group + 1), shape->out_channels);
        left.resize(static_cast<size_t>((end - first + Division::rows) * layer.taps()));
        with_widest_vectors(BlockTask{layer, first, end, division.first_column(group), end_column, left.data()});
    });
}
