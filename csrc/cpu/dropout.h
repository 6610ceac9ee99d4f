// The random numbers of dropout, a row at a time. Which number belongs to which element: detr_fast/ops/dropout.py.

#pragma once

#include <cstdint>
#include <cstring>

#include "../core/philox.h"
#include "../core/team.h"

namespace detr_fast {

constexpr int64_t dropout_calls_at_once = 16;
constexpr int64_t dropout_columns_at_once = 8 * dropout_calls_at_once;  // fill_random writes whole multiples of these

// Writes the numbers of columns [first, first + columns) of a row; first is a multiple of 32. The array has room for
// columns up to the next multiple of dropout_columns_at_once.
inline void fill_random(uint64_t seed, uint32_t image, uint32_t head, uint32_t row, int64_t first, int64_t columns,
                        uint16_t* numbers) {
    constexpr int64_t at_once = dropout_calls_at_once;
    for (int64_t done = 0; done < columns; done += dropout_columns_at_once) {
        const auto call = static_cast<uint32_t>((first + done) / 8);
        uint32_t words[4][at_once];
        DETR_FAST_PRAGMA(omp simd)
        for (int64_t i = 0; i < at_once; ++i) {
            const auto random = philox<7>(call + static_cast<uint32_t>(i), row, head, image, seed);
            words[0][i] = random.words[0];
            words[1][i] = random.words[1];
            words[2][i] = random.words[2];
            words[3][i] = random.words[3];
        }
        // A word of four calls is eight columns, as they lie in little-endian memory.
        for (int64_t group = 0; group < at_once / 4; ++group) {
            for (int64_t word = 0; word < 4; ++word) {
                std::memcpy(numbers + done + 32 * group + 8 * word, words[word] + 4 * group, 4 * sizeof(uint32_t));
            }
        }
    }
}

}  // namespace detr_fast
