// The matrix product of a few rows of bytes with a panel of columns of signed bytes, its sums in 32 bits and exact:
// what convolutions in 8-bit integers are made of.
//
// The right matrix [depth, columns] is packed once, in panels of 64 columns: a panel holds for every four k, column
// after column, the four numbers of each, with zeros beyond the last column and the last k. So it is read by the
// instructions that sum four products at once (VNNI), by the tiles of AMX, and by narrower vectors.

#pragma once

#include <cstdint>

namespace detr_fast {

constexpr int64_t int8_panel_columns = 64;
constexpr int64_t int8_rows = 32;        // of a product at most: two tiles of AMX
constexpr int64_t int8_depth_step = 64;  // depths are multiples of it: a row of an AMX tile

struct Int8Product {
    const uint8_t* left;  // [rows, depth], a row every `left_step` bytes; AMX reads `int8_rows` rows in any case
    int64_t left_step;
    int64_t rows;
    int64_t depth;
    const int8_t* panel;
    int32_t* sums;  // [int8_rows, int8_panel_columns]
};

// From the slowest to the fastest.
enum Int8Instructions : int { int8_plain, int8_pairs, int8_vnni, int8_amx };

// The fastest that this processor has, of those whose vectors vector_bytes() allows.
Int8Instructions fastest_int8_instructions();

// While it exists, products can be formed on this thread.
class Int8Products {
  public:
    explicit Int8Products(Int8Instructions instructions);
    ~Int8Products();
    Int8Products(const Int8Products&) = delete;
    Int8Products& operator=(const Int8Products&) = delete;

    void multiply(const Int8Product& product) const { multiply_(product); }

  private:
    void (*multiply_)(const Int8Product&);
    bool has_tiles_;
    alignas(64) uint8_t tiles_before_[64];
};

}  // namespace detr_fast
