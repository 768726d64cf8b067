// Arithmetic and indexing of sum_pieces: out[i] = scale * (((p0[i] + p1[i]) + p2[i]) + ...), in fp32, rounded once.
//
// Legend: P pieces of n elements each; `stride` is the distance between the beginnings of two pieces, in elements.
// Host and device compile the same body, so its indexing can be run by a C++ compiler alone, thread by thread.
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

// `yes` where the condition holds, else `no`: by masks, since no compiler makes vector code of a branch, and GCC makes a
// branch of a conditional expression around a floating-point operation (fp16 with AVX2: 6 times slower).
ALST_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// An element type is how it is stored, and how it becomes fp32 and is made of fp32 (to nearest, ties to even). Written
// without branches and without the compiler's half types: so these loops become vector code for every instruction set.

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
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN over into infinity or zero
    return static_cast<uint16_t>(select((bits & 0x7fffffffu) > 0x7f800000u, quiet_nan, rounded));
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
    // Exponents are 112 apart. To add 224 and multiply by 2^-112 leaves infinity and NaN what they are.
    const uint32_t normal = bits_of_float(float_of_bits(magnitude + (224u << 23)) * 0x1p-112f);
    // A subnormal m * 2^-24 is (2^-14 + m * 2^-24) - 2^-14, exactly, and without an fp32 subnormal on the way, which
    // some processors take a hundred cycles for.
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
    const uint32_t normal = select(magnitude >= 0x47800000u, 0x7c00u, rounded);  // 2^16; 65520 rounds up by itself
    // Below 2^-14: next to 0.5, fp32 has the spacing of fp16's subnormals, so the addition rounds.
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t finite = select(magnitude < (113u << 23), subnormal, normal);
    const uint32_t nan = 0x7e00u | ((bits >> 13) & 0x1ffu);
    return static_cast<uint16_t>(select(magnitude > 0x7f800000u, nan, finite) | ((bits >> 16) & 0x8000u));
#endif
  }
};

// Multiplication and addition that no compiler may fuse: a fused one rounds once where the definition rounds twice.
ALST_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ALST_INLINE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// What one addition of the whole needs to know.
struct Sum {
  const void* pieces;
  int64_t stride;
  int64_t num_pieces;
  void* out;
  int64_t n;
  float scale;
  bool accumulate;
  bool wide_loads;   // every piece begins at a multiple of 16 bytes
  bool wide_stores;  // and out at a multiple of what a thread stores at once
};

// 16 bytes that are loaded or stored by one instruction.
struct alignas(16) Words {
  uint32_t word[4];
};

// Elements that a thread adds at a time: 16 bytes of each piece.
template <typename In>
constexpr int kSpan = 16 / sizeof(typename In::Stored);

template <typename In>
ALST_INLINE float element(const Words& words, int i) {
  if constexpr (sizeof(typename In::Stored) == 4) {
    return In::widen(words.word[i]);
  } else {
    return In::widen((words.word[i / 2] >> (16 * (i % 2))) & 0xffffu);
  }
}

// 16 bytes of a piece, or its last `count` elements and zeros.
template <typename In>
ALST_INLINE Words load_span(const typename In::Stored* from, int count, bool wide) {
  if (wide && count == kSpan<In>) return *reinterpret_cast<const Words*>(from);
  Words words = {{0, 0, 0, 0}};
  ALST_UNROLL
  for (int i = 0; i < kSpan<In>; ++i) {
    const uint32_t stored = i < count ? from[i] : 0;
    if constexpr (sizeof(typename In::Stored) == 4) {
      words.word[i] = stored;
    } else {
      words.word[i / 2] |= stored << (16 * (i % 2));
    }
  }
  return words;
}

// Bytes that a thread stores at once: 16, or all of its span if that is less.
template <typename In, typename Out>
constexpr int kStoreBytes =
    kSpan<In> * sizeof(typename Out::Stored) < 16 ? int(kSpan<In> * sizeof(typename Out::Stored)) : 16;

template <typename In, typename Out>
ALST_INLINE void store_span(const float* value, typename Out::Stored* to, int count, bool wide) {
  if (wide && count == kSpan<In>) {
    struct alignas(kStoreBytes<In, Out>) Block {
      typename Out::Stored element[kStoreBytes<In, Out> / sizeof(typename Out::Stored)];
    };
    constexpr int kPerBlock = kStoreBytes<In, Out> / sizeof(typename Out::Stored);
    ALST_UNROLL
    for (int begin = 0; begin < kSpan<In>; begin += kPerBlock) {
      Block block;
      ALST_UNROLL
      for (int i = 0; i < kPerBlock; ++i) block.element[i] = Out::narrow(value[begin + i]);
      *reinterpret_cast<Block*>(to + begin) = block;
    }
  } else {
    ALST_UNROLL
    for (int i = 0; i < kSpan<In>; ++i) {
      if (i < count) to[i] = Out::narrow(value[i]);
    }
  }
}

// Where 16 bytes at a time are allowed: unaligned ones are an error on CUDA, and n and addresses may be any.
template <typename In, typename Out>
inline void decide_widths(Sum& sum) {
  const uint64_t distance = uint64_t(sum.stride) * sizeof(typename In::Stored);
  const bool even_distance = sum.num_pieces == 1 || distance % 16 == 0;
  sum.wide_loads = even_distance && reinterpret_cast<uintptr_t>(sum.pieces) % 16 == 0;
  sum.wide_stores = reinterpret_cast<uintptr_t>(sum.out) % kStoreBytes<In, Out> == 0;
}

// What thread `thread` of `num_threads` does: every num_threads-th span, all pieces of it.
template <typename In, typename Out>
ALST_INLINE void sum_spans(const Sum& sum, int64_t thread, int64_t num_threads) {
  constexpr int kBatch = 4;  // loads under way at once: memory answers late
  const auto* const pieces = static_cast<const typename In::Stored*>(sum.pieces);
  auto* const out = static_cast<typename Out::Stored*>(sum.out);
  for (int64_t begin = thread * kSpan<In>; begin < sum.n; begin += num_threads * kSpan<In>) {
    const int count = sum.n - begin < kSpan<In> ? int(sum.n - begin) : kSpan<In>;
    float total[kSpan<In>];
    for (int64_t first = 0; first < sum.num_pieces; first += kBatch) {
      Words batch[kBatch];
      ALST_UNROLL
      for (int k = 0; k < kBatch; ++k) {
        if (first + k < sum.num_pieces) {
          batch[k] = load_span<In>(pieces + (first + k) * sum.stride + begin, count, sum.wide_loads);
        }
      }
      ALST_UNROLL
      for (int k = 0; k < kBatch; ++k) {
        if (first + k >= sum.num_pieces) break;
        ALST_UNROLL
        for (int i = 0; i < kSpan<In>; ++i) {
          const float each = element<In>(batch[k], i);
          total[i] = first + k == 0 ? each : add(total[i], each);
        }
      }
    }
    ALST_UNROLL
    for (int i = 0; i < kSpan<In>; ++i) {
      total[i] = multiply(total[i], sum.scale);
      if (sum.accumulate && i < count) total[i] = add(Out::widen(out[begin + i]), total[i]);
    }
    store_span<In, Out>(total, out + begin, count, sum.wide_stores);
  }
}

}  // namespace alst
