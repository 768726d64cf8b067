// Element types with their conversions to and from fp32, and macros for vectorized functions.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ALST_INLINE __host__ __device__ __forceinline__
#define ALST_UNROLL _Pragma("unroll")  // so that arrays of a thread are registers
#else
#define ALST_INLINE inline __attribute__((always_inline))
#define ALST_UNROLL
#endif

// Compiles a function for each x86 instruction set; the loader picks one. aarch64's baseline suffices, and other
// compilers lack the attribute for inlined templates. GCC clones functions, not templates.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ALST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ALST_CLONES
#endif

namespace alst {

ALST_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ALST_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Select by masks: compilers do not vectorize a branch, and GCC turns a conditional expression around a floating-point
// operation into one (fp16 with AVX2: 6 times slower).
ALST_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// Storage type of an element, `widen` to fp32 and `narrow` from fp32 (to nearest, ties to even). No branches and no
// compiler half types, so that loops are vectorized for every instruction set.

struct Fp32 {
  using Stored = uint32_t;
  static ALST_INLINE float widen(uint32_t stored) { return float_of_bits(stored); }
  static ALST_INLINE uint32_t narrow(float value) { return bits_of_float(value); }
};

struct Bf16 {
  using Stored = uint16_t;
  static ALST_INLINE float widen(uint32_t stored) { return float_of_bits(stored << 16); }
  static ALST_INLINE uint16_t narrow(float value) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t quiet_nan = bits | 0x400000u;  // rounding could turn a NaN into infinity or zero
    return static_cast<uint16_t>(select((bits & 0x7fffffffu) > 0x7f800000u, quiet_nan, rounded) >> 16);
#endif
  }
};

struct Fp16 {
  using Stored = uint16_t;

  static ALST_INLINE float widen(uint32_t stored) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(static_cast<uint16_t>(stored)));
#else
    const uint32_t magnitude = (stored & 0x7fffu) << 13;
    // The exponent biases differ by 112. Adding 224 and multiplying by 2^-112 preserves infinity and NaN.
    const uint32_t normal = bits_of_float(float_of_bits(magnitude + (224u << 23)) * 0x1p-112f);
    // A subnormal m * 2^-24 is exactly (2^-14 + m * 2^-24) - 2^-14, without an fp32 subnormal as an intermediate, which
    // costs some processors a hundred cycles.
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23));
    return float_of_bits(select(magnitude < (0x400u << 13), subnormal, normal) | ((stored & 0x8000u) << 16));
#endif
  }

  static ALST_INLINE uint16_t narrow(float value) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = bits_of_float(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t normal = select(magnitude >= 0x47800000u, 0x7c00u, rounded);  // 2^16; 65520 rounds up to it
    // Below 2^-14: next to 0.5, fp32 has the spacing of fp16's subnormals, so the addition rounds.
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t finite = select(magnitude < (113u << 23), subnormal, normal);
    const uint32_t nan = 0x7e00u | ((bits >> 13) & 0x1ffu);
    return static_cast<uint16_t>(select(magnitude > 0x7f800000u, nan, finite) | ((bits >> 16) & 0x8000u));
#endif
  }
};

}  // namespace alst
