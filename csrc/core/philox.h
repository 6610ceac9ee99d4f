// Philox-4x32, a counter-based generator of random bits (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", 2011, section 3.3): the same counter and key give the same 128 bits in every kernel.

#pragma once

#include <cstdint>

#include "team.h"

namespace detr_fast {

struct Philox {
    uint32_t words[4];
};

// The words of a counter under a key. Free of branches, so that a loop over counters becomes vectors.
template <int rounds>
DETR_FAST_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    constexpr uint64_t multiplier0 = 0xD2511F53u;
    constexpr uint64_t multiplier1 = 0xCD9E8D57u;
    // The golden ratio and the square root of 3, less one.
    constexpr uint32_t step0 = 0x9E3779B9u;
    constexpr uint32_t step1 = 0xBB67AE85u;
    uint32_t k0 = static_cast<uint32_t>(key);
    uint32_t k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < rounds; ++round) {
        const uint64_t product0 = multiplier0 * c0;
        const uint64_t product1 = multiplier1 * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += step0;
        k1 += step1;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace detr_fast
