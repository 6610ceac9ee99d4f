// bfloat16 and float16 as they lie in memory. Written out in integers and floats, so that the host's run of a kernel
// reads them as the device does.

#pragma once

#include <cstdint>
#include <cstring>

#include "team.h"

namespace detr_fast {

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

namespace half_types {

DETR_FAST_HD float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

}  // namespace half_types

DETR_FAST_HD float widened(float x) {
    return x;
}

DETR_FAST_HD double widened(double x) {
    return x;
}

DETR_FAST_HD float widened(Bfloat16 x) {
    return half_types::float_of(static_cast<uint32_t>(x.bits) << 16);
}

// The exponent's bias grows from 15 to 127 by a product with 2^112, which is right for subnormal numbers, too.
DETR_FAST_HD float widened(Float16 x) {
    constexpr uint32_t exponent_of_infinity = 0x7f800000u;
    constexpr float two_to_112 = 5192296858534827628530496329220096.0f;
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    const bool is_finite = (x.bits & 0x7c00u) != 0x7c00u;
    const float size =
        is_finite ? half_types::float_of(rest) * two_to_112 : half_types::float_of(rest | exponent_of_infinity);
    return sign == 0 ? size : -size;
}

}  // namespace detr_fast
