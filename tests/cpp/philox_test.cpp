// csrc/core/philox.h against the known answers of Random123 (its file kat_vectors, philox4x32 with 10 rounds).

#include "philox.h"

#include <cstdio>

namespace {

struct Answer {
    uint32_t counter[4];
    uint64_t key;
    uint32_t words[4];
};

constexpr Answer known[] = {
    {{0, 0, 0, 0}, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
    {{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu},
     0xffffffffffffffffu,
     {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
    {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
     0x299f31d0a4093822u,
     {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
};

}  // namespace

int main() {
    int wrong = 0;
    for (const Answer& answer : known) {
        const auto& c = answer.counter;
        const auto found = detr_fast::philox<10>(c[0], c[1], c[2], c[3], answer.key);
        for (int i = 0; i < 4; ++i) {
            if (found.words[i] == answer.words[i]) continue;
            std::fprintf(stderr, "word %d: got %08x, expected %08x\n", i, found.words[i], answer.words[i]);
            ++wrong;
        }
    }
    return wrong;
}
