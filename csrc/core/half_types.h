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

DETR_FAST_HD uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
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

// Rounding to nearest, ties to even; a NaN stays one. Free of branches, so that loops over them become vectors.
DETR_FAST_HD void narrow(float x, Bfloat16& to) {
    const uint32_t bits = half_types::bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

DETR_FAST_HD void narrow(float x, Float16& to) {
    const uint32_t bits = half_types::bits_of(x);
    const uint32_t size = bits & 0x7fffffffu;
    const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    // The last bit of a number from 0.5 on is worth 2^-24, as that of float16's subnormal numbers.
    const uint32_t subnormal = half_types::bits_of(half_types::float_of(size) + 0.5f) - 0x3f000000u;
    const uint32_t finite = size < 0x38800000u ? subnormal : normal;  // 2^-14
    const uint32_t special = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t rounded = size >= 0x477ff000u ? special : finite;  // 65520 rounds to infinity
    to.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | rounded);
}

DETR_FAST_HD void narrow(double x, float& to) {
    to = static_cast<float>(x);
}

DETR_FAST_HD void narrow(float x, float& to) {
    to = x;
}

DETR_FAST_HD void narrow(double x, double& to) {
    to = x;
}

}  // namespace detr_fast
