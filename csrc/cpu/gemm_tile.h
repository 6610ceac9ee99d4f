// The matrix product of a few rows with a panel of columns, its sums in registers: what convolutions are made of.
//
// The right matrix [depth, columns] is packed once, in panels of 64 columns: panel p holds for every k the numbers of
// columns 64 p to 64 p + 63 one behind the other, with zeros beyond the last column. A panel is the same for every
// width of vectors; narrower ones take parts of it.
//
// The left matrix is read as it lies: every row is given by an address, and its numbers from there on are the first
// `depth` of it. So the pixels of a map [B, H, W, C] are rows of depth C without a copy, the pixels under one weight of
// a 3x3 kernel are so too, and a row outside of the map has the address of zeros.

#pragma once

#include <algorithm>
#include <cstdint>

#include "registers.h"

namespace detr_fast {

constexpr int64_t panel_columns = 64;

inline int64_t panels_of(int64_t columns) {
    return (columns + panel_columns - 1) / panel_columns;
}

// Floats that the packed matrix takes.
inline int64_t packed_floats(int64_t depth, int64_t columns) {
    return panels_of(columns) * depth * panel_columns;
}

// right[k * depth_step + c * column_step] to panels. `packed` has packed_floats(depth, columns).
inline void pack_panels(const float* right, int64_t depth, int64_t columns, int64_t depth_step, int64_t column_step,
                        float* packed) {
    for (int64_t first = 0; first < columns; first += panel_columns) {
        const int64_t count = std::min(panel_columns, columns - first);
        for (int64_t k = 0; k < depth; ++k, packed += panel_columns) {
            const float* row = right + k * depth_step + first * column_step;
            for (int64_t c = 0; c < count; ++c) packed[c] = row[c * column_step];
            std::fill(packed + count, packed + panel_columns, 0.0f);
        }
    }
}

// Rows and columns of a tile. With AVX-512, 24 of 32 registers are sums: 6 x 64 reaches 180 to 200 GFLOP/s of 214 on a
// core where 12 x 32 reaches 165 to 185, whose rows' addresses do not fit in registers. With AVX2, 12 of 16 are sums.
template <int Bytes>
struct Tile {
    using Floats = typename Registers<Bytes>::Floats;
    static constexpr int rows = 6;
    static constexpr int vectors = Bytes == 64 ? 4 : 2;
    static constexpr int columns = vectors * Registers<Bytes>::width;
    static_assert(panel_columns % columns == 0);
};

struct Nothing {
    DETR_FAST_INLINE void operator()() const {}
};

DETR_FAST_INLINE void prefetch(const float* address) {
#if defined(DETR_FAST_HAS_VECTORS)
    __builtin_prefetch(address, 0, 2);
#endif
}

// Fetches the next panel, of which each of `parts` tiles that meet the one before takes its part.
class NextPanel {
  public:
    DETR_FAST_INLINE NextPanel(const float* next, int64_t depth, int64_t part, int64_t parts)
        : next_(next + depth * panel_columns * part / parts), step_((panel_columns + parts - 1) / parts) {}

    DETR_FAST_INLINE void operator()() {
        prefetch(next_);
        next_ += step_;
    }

  private:
    const float* next_;
    const int64_t step_;
};

// Fetches the pixels that the next tile multiplies, in one piece, and the rows of the result that it goes to.
class NextTile {
  public:
    DETR_FAST_INLINE NextTile(const float* x, int64_t x_floats, const float* out, int64_t row_step, int64_t row_floats,
                              int64_t rows)
        : x_(x),
          x_end_(x + x_floats),
          out_(out),
          row_end_(out + row_floats),
          row_step_(row_step),
          row_floats_(row_floats),
          rows_(rows) {}

    DETR_FAST_INLINE void operator()() {
        if (x_ < x_end_) prefetch(x_);
        x_ += line;
        if (rows_ == 0) return;
        prefetch(out_);
        out_ += line;
        if (out_ < row_end_) return;
        row_end_ += row_step_;
        out_ = row_end_ - row_floats_;
        --rows_;
    }

  private:
    static constexpr int64_t line = 16;
    const float *x_, *x_end_, *out_, *row_end_;
    const int64_t row_step_, row_floats_;
    int64_t rows_;
};

// left[run * rows + r] is the address of `depth` numbers of row r; the runs follow one another in the depth of the
// panel, of which `panel` is the tile's first column. The sums begin with start(r, v) and go to finish(r, v, sum); r
// and v are constants. meanwhile() is called at every step in depth: it may fetch what later tiles read.
template <int Bytes, int rows = Tile<Bytes>::rows, typename Start, typename Finish, typename Meanwhile = Nothing>
DETR_FAST_INLINE void multiply_tile(const float* const* left, int64_t runs, int64_t depth, const float* panel,
                                    const Start& start, const Finish& finish, Meanwhile meanwhile = {}) {
    using Floats = typename Tile<Bytes>::Floats;
    constexpr int vectors = Tile<Bytes>::vectors, width = Registers<Bytes>::width;
    Floats sum[rows][vectors];
    const auto each_sum = [&](const auto& visit) DETR_FAST_LAMBDA {
        unrolled<rows>([&](auto r) DETR_FAST_LAMBDA {
            unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA { visit(r, v, sum[r][v]); });
        });
    };
    each_sum([&](auto r, auto v, Floats& s) DETR_FAST_LAMBDA { s = start(r, v); });
    for (int64_t run = 0; run < runs; ++run, left += rows) {
        const float* row[rows];
        unrolled<rows>([&](auto r) DETR_FAST_LAMBDA { row[r] = left[r]; });
        const auto add = [&](int64_t k, const float* right) DETR_FAST_LAMBDA {
            meanwhile();
            Floats factor[vectors];
            unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA { factor[v] = load_as<Floats>(right + v * width); });
            unrolled<rows>([&](auto r) DETR_FAST_LAMBDA {
                const float number = row[r][k];
                unrolled<vectors>([&](auto v) DETR_FAST_LAMBDA { sum[r][v] += number * factor[v]; });
            });
        };
        int64_t k = 0;
        for (; k + 2 <= depth; k += 2, panel += 2 * panel_columns) {
            add(k, panel);
            add(k + 1, panel + panel_columns);
        }
        for (; k < depth; ++k, panel += panel_columns) add(k, panel);
    }
    each_sum([&](auto r, auto v, const Floats& s) DETR_FAST_LAMBDA { finish(r, v, s); });
}

}  // namespace detr_fast
