// exp, tanh, the sigmoid and the normal distribution of fp32, written without branches, so that loops of them become
// vector code for every instruction set.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace alst {

ALST_INLINE float choose(bool condition, float yes, float no) {
  return float_of_bits(select(condition, bits_of_float(yes), bits_of_float(no)));
}

// Within 2 units in the last place for x between -87.3 and 88. NaN is NaN.
ALST_INLINE float exp_within(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float rounded = x * 1.44269504f + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n * the first is exact
  // Cephes' polynomial for |r| <= ln 2 / 2.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  return y * float_of_bits((bits_of_float(rounded) << 23) + (127u << 23));  // times 2^n
}

// The same for any x; 0 below -87.3, where the result would be subnormal, and 1.7e38 above 88.
ALST_INLINE float exp_of(float x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.0f;
  const float inside = choose(x > kHighest, kHighest, choose(x < kLowest, kLowest, x));
  return choose(x < kLowest, 0.0f, exp_within(inside));
}

// Within 3 units in the last place. Near 0 by Cephes' polynomial, where 1 - 2 / (exp(2x) + 1) would lose digits.
ALST_INLINE float tanh_of(float x) {
  const float a = float_of_bits(bits_of_float(x) & 0x7fffffffu);
  const float s = a * a;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = x + x * s * p;
  const float far = 1.0f - 2.0f / (exp_of(2.0f * a) + 1.0f);
  const float with_sign = float_of_bits(bits_of_float(far) | (bits_of_float(x) & 0x80000000u));
  return choose(a < 0.625f, near, with_sign);
}

struct Sigmoid {
  float share, rest;
};

// The sigmoid of x and 1 less it, each within 4 units in the last place, for |x| <= 87.
ALST_INLINE Sigmoid sigmoid_within(float x) {
  const float odds = exp_within(-x), share = 1.0f / (1.0f + odds);
  return {share, odds * share};
}

// The share of the normal distribution below x, where `bell` is exp(-x^2 / 2). The share beyond |x| is the bell times
// half of erfcx(|x| / sqrt(2)), which is w times a polynomial of w = 1 / (1 + 0.26 |x|), fitted to a relative 3e-8 for
// |x| <= 14.5: so both tails keep their digits, which 1 + erf loses.
ALST_INLINE float normal_of(float x, float bell) {
  const float w = 1.0f / (1.0f + 0.26f * float_of_bits(bits_of_float(x) & 0x7fffffffu));
  float p = 0.030230146f;
  p = p * w - 0.15149373f;
  p = p * w + 0.24873185f;
  p = p * w - 0.1477879f;
  p = p * w + 0.15875784f;
  p = p * w + 0.051965185f;
  p = p * w + 0.1027886f;
  p = p * w + 0.1030510f;
  p = p * w + 0.103757024f;
  const float tail = p * w * bell;
  return choose(x < 0.0f, tail, 1.0f - tail);
}

}  // namespace alst
