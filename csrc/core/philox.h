// Philox-4x32, a counter-based generator of random bits (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", 2011, section 3.3): the same counter and key give the same 128 bits in every kernel.

#pragma once

#include <cstdint>

#include "team.h"

namespace detr_fast {

// The 64 bits of a product as two words.
struct WideProduct {
    DETR_FAST_HD void operator()(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) const {
        const uint64_t product = static_cast<uint64_t>(a) * b;
        high = static_cast<uint32_t>(product >> 32);
        low = static_cast<uint32_t>(product);
    }
};

// The words of a counter under a key, in place of the counter. Word is uint32_t, or a vector of them with a Product
// that takes it.
template <int rounds, typename Word, typename Product>
DETR_FAST_HD void philox_rounds(Word& c0, Word& c1, Word& c2, Word& c3, uint64_t key, const Product& product) {
    constexpr uint32_t multiplier0 = 0xD2511F53u;
    constexpr uint32_t multiplier1 = 0xCD9E8D57u;
    // The golden ratio and the square root of 3, less one.
    constexpr uint32_t step0 = 0x9E3779B9u;
    constexpr uint32_t step1 = 0xBB67AE85u;
    uint32_t k0 = static_cast<uint32_t>(key);
    uint32_t k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < rounds; ++round) {
        Word high0, low0, high1, low1;
        product(c0, multiplier0, high0, low0);
        product(c2, multiplier1, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += step0;
        k1 += step1;
    }
}

struct Philox {
    uint32_t words[4];
};

// The words of one counter. Free of branches, so that a loop over counters becomes vectors.
template <int rounds>
DETR_FAST_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    philox_rounds<rounds>(c0, c1, c2, c3, key, WideProduct{});
    return {{c0, c1, c2, c3}};
}

}  // namespace detr_fast
