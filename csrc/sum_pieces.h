// Arithmetic and indexing of sum_pieces: out[i] = scale * (((p0[i] + p1[i]) + p2[i]) + ...), in fp32, rounded once.
//
// Legend: P pieces of n elements each; `stride` is the distance between the starts of two pieces, in elements.
// Host and device compile the same body, so its indexing can be tested without a GPU.
#pragma once

#include "dtypes.h"

namespace alst {

// Addition and multiplication that nvcc may not fuse, which would round once where the definition rounds twice.
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

// Arguments of one sum.
struct Sum {
  const void* pieces;
  int64_t stride;
  int64_t num_pieces;
  void* out;
  int64_t n;
  float scale;
  bool accumulate;
  bool wide_loads;   // every piece starts at a multiple of 16 bytes
  bool wide_stores;  // out starts at a multiple of kStoreBytes
};

// 16 bytes, loaded or stored by one instruction.
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

// Bytes that a thread stores at once: 16, or its whole span if that is less.
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

// Decide where 16-byte accesses are allowed: CUDA requires alignment, and n and the addresses are arbitrary.
template <typename In, typename Out>
inline void decide_widths(Sum& sum) {
  const uint64_t distance = uint64_t(sum.stride) * sizeof(typename In::Stored);
  const bool even_distance = sum.num_pieces == 1 || distance % 16 == 0;
  sum.wide_loads = even_distance && reinterpret_cast<uintptr_t>(sum.pieces) % 16 == 0;
  sum.wide_stores = reinterpret_cast<uintptr_t>(sum.out) % kStoreBytes<In, Out> == 0;
}

// Sum every num_threads-th span over all pieces, in thread `thread`.
template <typename In, typename Out>
ALST_INLINE void sum_spans(const Sum& sum, int64_t thread, int64_t num_threads) {
  constexpr int kBatch = 4;  // loads in flight, to hide memory latency
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
