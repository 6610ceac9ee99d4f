#include "bottleneck.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cache_size.h"
#include "solver.h"
#include "thread_pool.h"
#include "widths.h"
#include "winograd.h"
#include "winograd_block.h"

namespace detr_fast {
namespace {

using namespace winograd;

constexpr int64_t tile_rows = 6;  // of every width

struct Bottleneck {
    const detr_fast_conv_block& block;
    const detr_fast_map& map;
    const float* x;
    float* out;
    detr_fast_conv middle;  // shape of the 3x3 convolution
    const float* weights = nullptr;

    const detr_fast_packed_conv& reduce() const { return block.convs[0]; }
    const detr_fast_packed_conv& expand() const { return block.convs[2]; }
    int64_t pixel(int64_t image, int64_t row, int64_t column) const {
        return (image * map.height + row) * map.width + column;
    }
    int64_t patch_rows() const { return Patches::along(map.height, 1); }
    int64_t patch_columns() const { return Patches::along(map.width, 1); }
    // A row of the first inner map with the zeros around it, up to the last patch's inputs.
    int64_t row_floats() const { return (patch_columns() * outputs + 2) * middle.channels; }

    // Columns that are taken from the first convolution to the last at once: whole tiles and patches, in chunks of
    // about the same width.
    int64_t chunk_columns() const {
        constexpr int64_t step = 12;
        const int64_t most = most_columns(), chunks = (map.width + most - 1) / most;
        return ((map.width + chunks - 1) / chunks + step - 1) / step * step;
    }

    // What is read first should be in the second cache still when it is added to. Where weights alone fill the cache,
    // they should rather meet many patches. On two cores with 2 MB each, chunks of 96 to 300 columns are equally fast
    // with 64 channels at 800x1066; with 128, 300 take 0.97 of the time of 96.
    int64_t most_columns() const {
        const auto bytes_of = [](int64_t floats) { return floats * static_cast<int64_t>(sizeof(float)); };
        const int64_t of_weights = bytes_of(weights_floats(middle));
        const int64_t left = second_cache_bytes() * 3 / 4 - of_weights;
        if (of_weights > second_cache_bytes() / 2) return map.width;
        const int64_t inner = std::max(middle.channels, middle.out_channels);
        const int64_t products = (positions + 1) * inner / outputs;
        const int64_t of_column = outputs * reduce().channels + products + (inputs + outputs) * inner;
        return std::max<int64_t>(48, left / bytes_of(of_column));
    }
};

// Pixels that a 1x1 convolution reads, writes, and adds before it writes, wherever they lie.
class Pixels {
  public:
    // Tiles are filled up with a pixel that nobody reads.
    void close(float* nobody) {
        while (from_.size() % tile_rows != 0) add(from_.back(), nobody, nobody);
        const float* const last = from_.back();
        float* const last_to = to_.back();
        from_.push_back(last), to_.push_back(last_to);  // what is fetched after the last tile
    }
    void clear() { from_.clear(), to_.clear(), residual_.clear(); }
    void add(const float* from, float* to, const float* residual) {
        from_.push_back(from), to_.push_back(to), residual_.push_back(residual);
    }
    bool empty() const { return from_.empty(); }

    template <int Bytes, bool adds>
    DETR_FAST_INLINE void multiply(const detr_fast_packed_conv& conv, bool relu) const {
        using Floats = typename Tile<Bytes>::Floats;
        constexpr int width = Registers<Bytes>::width, columns = Tile<Bytes>::columns;
        const int64_t depth = conv.channels, count = static_cast<int64_t>(residual_.size());
        const Floats lowest = Floats{} + (relu ? 0.0f : -__builtin_inff());
        for (int64_t c = 0; c < conv.out_channels; c += columns) {
            const float* const panel = conv.packed + c / panel_columns * panel_columns * depth + c % panel_columns;
            for (int64_t p = 0; p < count; p += tile_rows) {
                float* const* const to = to_.data() + p;
                const float* const* const residual = residual_.data() + p;
                const NextTile fetch(from_[p + tile_rows], c == 0 ? tile_rows * depth : 0, to[tile_rows] + c,
                                     conv.out_channels, columns, tile_rows);
                multiply_tile<Bytes>(
                    from_.data() + p, 1, depth, panel, [](auto, auto) DETR_FAST_LAMBDA { return Floats{}; },
                    [&](auto r, auto v, const Floats& sum) DETR_FAST_LAMBDA {
                        const int64_t at = c + v * width;
                        Floats addend = conv.bias == nullptr ? Floats{} : load_as<Floats>(conv.bias + at);
                        if (adds) addend += load_as<Floats>(residual[r] + at);
                        const Floats y = sum + addend;
                        store_as(to[r] + at, y < lowest ? lowest : y);
                    },
                    fetch);
            }
        }
    }

  private:
    std::vector<const float*> from_, residual_;
    std::vector<float*> to_;
};

// What a thread works in.
struct Memory {
    Scratch scratch;
    Pixels pixels;
    float *rows, *zeros, *products, *middle, *nobody;

    int64_t product_step;  // from one position to the next

    void reserve(const Bottleneck& b) {
        const int64_t of_row = b.row_floats(), columns = b.chunk_columns();
        product_step = columns / outputs * std::max(b.middle.channels, b.middle.out_channels) + 16;
        const int64_t of_products = (positions + 1) * product_step;
        const int64_t of_middle = outputs * columns * b.middle.out_channels;
        const int64_t of_nobody = std::max(b.reduce().out_channels, b.expand().out_channels);
        rows = reserve_floats(scratch, (inputs + 1) * of_row + of_products + of_middle + of_nobody);
        zeros = rows + inputs * of_row;
        products = zeros + of_row;
        middle = products + of_products;
        nobody = middle + of_middle;
        std::fill_n(rows, (inputs + 1) * of_row, 0.0f);
        std::fill_n(nobody, of_nobody, 0.0f);
    }
};

// Rows [first, end) of an image's result: whole patches, but at the end of the image. `above` and `below` are the first
// inner map's rows there, which have been computed before: where x is out, others write to what they are made of.
template <int Bytes>
class Band {
  public:
    Band(const Bottleneck& b, Memory& memory, int64_t image, int64_t first, int64_t end, const float* above,
         const float* below)
        : b_(b), memory_(memory), image_(image), first_(first), end_(end), above_(above), below_(below) {}

    DETR_FAST_INLINE void run() {
        const int64_t columns = b_.chunk_columns();
        for (int64_t top = first_; top < end_; top += outputs) {
            for (int64_t column = 0; column < b_.map.width; column += columns) {
                const int64_t next = std::min(column + columns, b_.map.width);
                reduce(top, column == 0 ? 0 : std::min(column + tile_rows, b_.map.width),
                       std::min(next + tile_rows, b_.map.width));
                patches(top, column, next);
                expand(top, column, next);
            }
        }
    }

    // A row of the first inner map.
    DETR_FAST_INLINE static void one_row(const Bottleneck& b, Memory& memory, int64_t image, int64_t y, float* row) {
        memory.pixels.clear();
        add_row(b, memory, image, y, 0, b.map.width, row);
        memory.pixels.close(memory.nobody);
        memory.pixels.template multiply<Bytes, false>(b.reduce(), true);
    }

  private:
    using Floats = typename Registers<Bytes>::Floats;
    static constexpr int64_t width = Registers<Bytes>::width;

    static void add_row(const Bottleneck& b, Memory& memory, int64_t image, int64_t y, int64_t column, int64_t end,
                        float* row) {
        const int64_t channels = b.reduce().channels, inner = b.middle.channels;
        for (; column < end; ++column) {
            float* const to = row + (column + 1) * inner;
            memory.pixels.add(b.x + b.pixel(image, y, column) * channels, to, to);
        }
    }

    float* ring(int64_t y) const { return memory_.rows + y % inputs * b_.row_floats(); }
    const float* row(int64_t y) const {
        if (y < 0 || y >= b_.map.height) return memory_.zeros;
        return y < first_ ? above_ : y >= end_ ? below_ : ring(y);
    }

    // The rows that patches from `top` on read and those above them have not.
    DETR_FAST_INLINE void reduce(int64_t top, int64_t column, int64_t end) {
        memory_.pixels.clear();
        const int64_t last = std::min(top + outputs + 1, end_);
        for (int64_t y = top == first_ ? top : top + 1; y < last; ++y)
            add_row(b_, memory_, image_, y, column, end, ring(y));
        if (memory_.pixels.empty()) return;
        memory_.pixels.close(memory_.nobody);
        memory_.pixels.template multiply<Bytes, false>(b_.reduce(), true);
    }

    DETR_FAST_INLINE void patches(int64_t top, int64_t column, int64_t end) {
        const detr_fast_conv& s = b_.middle;
        const int64_t count = Patches::along(end - column, 1), step = memory_.product_step;
        float* const transformed = memory_.products + step;
        const float* rows[inputs];
        for (int64_t i = 0; i < inputs; ++i) rows[i] = row(top - 1 + i) + column * s.channels;
        for (int64_t p = 0; p < count; ++p) {
            for (int64_t c = 0; c < s.channels; c += width) {
                transform_inputs<Bytes>(transformed + p * s.channels + c, step, [&](auto i, auto j) DETR_FAST_LAMBDA {
                    return load_as<Floats>(rows[i] + (p * outputs + j) * s.channels + c);
                });
            }
        }
        for (int64_t position = 0; position < positions; ++position) {
            multiply_position<Bytes>(s, count, transformed + position * step,
                                     b_.weights + position * packed_floats(s.channels, s.out_channels),
                                     memory_.products + position * step);
        }
        const float* const bias = b_.block.convs[1].bias;
        const int64_t row_step = b_.chunk_columns() * s.out_channels;
        for (int64_t p = 0; p < count; ++p) {
            for (int64_t k = 0; k < s.out_channels; k += width) {
                const Floats added = bias == nullptr ? Floats{} : load_as<Floats>(bias + k);
                float* const to = memory_.middle + p * outputs * s.out_channels + k;
                transform_products<Bytes>(memory_.products + p * s.out_channels + k, step,
                                          [&](auto i, auto j, Floats y) DETR_FAST_LAMBDA {
                                              y += added;
                                              y = y < 0.0f ? Floats{} : y;  // in this order NaN stays
                                              store_as(to + i * row_step + j * s.out_channels, y);
                                          });
            }
        }
    }

    DETR_FAST_INLINE void expand(int64_t top, int64_t column, int64_t end) {
        if (b_.block.shortcut != nullptr) {
            shortcut(top, column, end);
        }
        memory_.pixels.clear();
        const int64_t inner = b_.middle.out_channels, channels = b_.expand().out_channels;
        const float* const residual = b_.block.shortcut != nullptr ? b_.out : b_.x;
        for (int64_t y = top; y < std::min(top + outputs, end_); ++y) {
            const float* from = memory_.middle + (y - top) * b_.chunk_columns() * inner;
            const int64_t first = b_.pixel(image_, y, column);
            for (int64_t pixel = first; pixel < first + end - column; ++pixel, from += inner)
                memory_.pixels.add(from, b_.out + pixel * channels, residual + pixel * channels);
        }
        memory_.pixels.close(memory_.nobody);
        memory_.pixels.template multiply<Bytes, true>(b_.expand(), true);
    }

    DETR_FAST_INLINE void shortcut(int64_t top, int64_t column, int64_t end) {
        memory_.pixels.clear();
        const int64_t before = b_.reduce().channels, channels = b_.expand().out_channels;
        for (int64_t y = top; y < std::min(top + outputs, end_); ++y) {
            const int64_t first = b_.pixel(image_, y, column);
            for (int64_t pixel = first; pixel < first + end - column; ++pixel) {
                float* const to = b_.out + pixel * channels;
                memory_.pixels.add(b_.x + pixel * before, to, to);
            }
        }
        memory_.pixels.close(memory_.nobody);
        memory_.pixels.template multiply<Bytes, false>(*b_.block.shortcut, false);
    }

    const Bottleneck& b_;
    Memory& memory_;
    const int64_t image_, first_, end_;
    const float *const above_, *const below_;
};

// Bands of patch rows, as many for each thread.
struct Division {
    int64_t images, bands, patch_rows;

    Division(const Bottleneck& b, int threads)
        : images(b.map.batch),
          bands(std::min<int64_t>(b.patch_rows(), threads / std::gcd<int64_t, int64_t>(images, threads))),
          patch_rows(b.patch_rows()) {}
    int64_t borders() const { return bands - 1; }
    int64_t first_row(int64_t band) const { return patch_rows * band / bands * outputs; }
};

struct BorderTask {
    const Bottleneck& b;
    Memory& memory;
    int64_t image, y;
    float* row;

    template <int Bytes>
    bool run() const {
        std::fill_n(row, b.row_floats(), 0.0f);
        Band<Bytes>::one_row(b, memory, image, y, row);
        return true;
    }
};

struct BandTask {
    const Bottleneck& b;
    Memory& memory;
    int64_t image, first, end;
    const float *above, *below;

    template <int Bytes>
    bool run() const {
        Band<Bytes>(b, memory, image, first, end, above, below).run();
        return true;
    }
};

Memory& memory_for(const Bottleneck& b) {
    static thread_local Memory memory;
    memory.reserve(b);
    return memory;
}

void run_bands(const Bottleneck& b, int threads) {
    static thread_local Scratch scratch;
    const Division division(b, threads);
    const int64_t of_image = 2 * division.borders();  // rows: those above and below a border
    float* const rows = reserve_floats(scratch, division.images * of_image * b.row_floats());
    const auto border_row = [&](int64_t image, int64_t number) {
        return rows + (image * of_image + number) * b.row_floats();
    };
    parallel_for(division.images * of_image, threads, [&](int64_t i) {
        const int64_t image = i / of_image, number = i % of_image;
        const int64_t y = division.first_row(number / 2 + 1) - (number % 2 == 0 ? 1 : 0);
        with_widest_vectors(BorderTask{b, memory_for(b), image, y, border_row(image, number)});
    });
    parallel_for(division.images * division.bands, threads, [&](int64_t i) {
        const int64_t image = i / division.bands, band = i % division.bands;
        const float* const above = band == 0 ? nullptr : border_row(image, 2 * band - 2);
        const float* const below = band + 1 == division.bands ? nullptr : border_row(image, 2 * band + 1);
        const int64_t end = std::min(division.first_row(band + 1), b.map.height);
        with_widest_vectors(BandTask{b, memory_for(b), image, division.first_row(band), end, above, below});
    });
}

detr_fast_conv middle_of(const detr_fast_packed_conv& conv, const detr_fast_map& map) {
    return {map.batch,         map.height,         map.width,         conv.channels, map.height,   map.width,
            conv.out_channels, conv.kernel_height, conv.kernel_width, conv.stride,   conv.padding, conv.dilation};
}

bool is_pointwise(const detr_fast_packed_conv& conv) {
    return conv.kernel_height == 1 && conv.kernel_width == 1 && conv.stride == 1 && conv.padding == 0;
}

}  // namespace

bool is_bottleneck(const detr_fast_conv_block& block, const detr_fast_map& map) {
    if (block.count != 3 || !is_pointwise(block.convs[0]) || !is_pointwise(block.convs[2])) return false;
    if (block.shortcut != nullptr && !is_pointwise(*block.shortcut)) return false;
    const detr_fast_conv middle = middle_of(block.convs[1], map);
    if (!detr_fast_winograd_is_faster(&middle) || middle.dilation != 1 || !has_few_channels(middle)) return false;
    return std::all_of(block.convs, block.convs + 3,
                       [](const auto& conv) { return conv.out_channels % panel_columns == 0; });
}

void run_bottleneck(const detr_fast_conv_block& block, const detr_fast_map& map, const float* x, float* out,
                    int threads) {
    static thread_local Scratch of_weights;
    Bottleneck b{block, map, x, out, middle_of(block.convs[1], map)};
    float* const weights = reserve_floats(of_weights, weights_floats(b.middle));
    transform_all_weights(b.middle, block.convs[1].packed, weights, threads);
    b.weights = weights;
    run_bands(b, std::max(threads, 1));
}

}  // namespace detr_fast
