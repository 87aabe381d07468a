// e^x for the attention kernels.
#pragma once

#include "flashsink.h"

namespace flashsink {

// e^x to 1.2e-7: x = n ln 2 + r, a minimax polynomial for e^r (relative error 4e-9), and n added to the exponent. Below
// -87 it is 0, above 88 it stays finite (never counted); NaN stays NaN. No branch and no table, so it vectorizes.
FLASHSINK_INLINE float exponential(float x) {
    const float bounded = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float shifted = bounded * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.38146104e-3f;
    p = p * r + 8.36871099e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &shifted, sizeof power);
    bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return x < -87.0f ? 0.0f : y;
}

// tanh x to 2e-7: an odd polynomial (Cephes) up to 0.625, where 1 - 2 / (e^2x + 1) cancels.
FLASHSINK_INLINE float hyperbolic_tangent(float x) {
    const float z = x * x, size = x < 0.0f ? -x : x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const float small = x + x * z * p;
    const float large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return size < 0.625f ? small : x < 0.0f ? -large : large;
}

}  // namespace flashsink
