// pack_bits_ and unpack_bits_ on CPU: the format is that of deepspeed_alst/kernels/bf16_codec.py, which checks the
// tensors. n values in segments; threads take the places of their segments' escapes in any order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "dtypes.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 64, kGroup = 8, kSegment = 4096, kEscapes = kSegment / 16, kHeader = 16;
constexpr int kWindow = 7, kRounds = 6;
constexpr int64_t kGrain = 16;  // segments below which a second thread costs more than it saves

// One segment of the packed values.
struct Segment {
  uint8_t* mantissas;
  uint16_t* low;
  uint8_t* high;
  uint8_t* first;
  int64_t* start;
};

struct Packed {
  uint8_t* begin;
  int64_t num_segments;

  uint8_t* escapes() const { return begin + kHeader; }
  int64_t room() const { return kEscapes * num_segments; }
  Segment segment(int64_t i) const {
    uint8_t* const mantissas = escapes() + room();
    uint8_t* const low = mantissas + kSegment * num_segments;
    uint8_t* const high = low + 2 * kSegment / kGroup * num_segments;
    uint8_t* const first = high + kSegment / kGroup * num_segments;
    uint8_t* const starts = first + kSegment / kBlock * num_segments;
    return {mantissas + i * kSegment, reinterpret_cast<uint16_t*>(low) + i * (kSegment / kGroup),
            high + i * (kSegment / kGroup), first + i * (kSegment / kBlock), reinterpret_cast<int64_t*>(starts) + i};
  }
};

// A loop below has one reduction at most: compilers make no vector code of more.

ALST_INLINE uint8_t largest(const uint8_t* exponents) {
  uint8_t top = 0;
  for (int i = 0; i < kBlock; ++i) top = std::max(top, exponents[i]);
  return top;
}

// First exponent of the window that covers the most, of those that end at one of the largest exponents.
ALST_INLINE uint8_t first_exponent(const uint8_t* exponents) {
  uint8_t rest[kBlock], top = largest(exponents), first = 0;
  std::memcpy(rest, exponents, kBlock);
  for (int round = 0, most = 0; round < kRounds; ++round) {
    const uint8_t low = std::max(top - (kWindow - 1), 0), width = top - low;
    int covered = 0, below = 0;
    for (int i = 0; i < kBlock; ++i) covered += static_cast<uint8_t>(exponents[i] - low) <= width;
    for (int i = 0; i < kBlock; ++i) below += exponents[i] < top;
    if (covered > most) first = low, most = covered;
    if (below <= most) break;  // no other window covers more
    for (int i = 0; i < kBlock; ++i) rest[i] = rest[i] < top ? rest[i] : 0;
    top = largest(rest);
  }
  return first;
}

// Bit 0 of each byte that is 7, of 8 codes.
ALST_INLINE uint64_t escapes_of(uint64_t codes) { return codes & codes >> 1 & codes >> 2 & 0x0101010101010101u; }

// Packs a segment; its escapes, at most kSegment, are returned separately.
ALST_CLONES int64_t pack_segment(const uint16_t* __restrict bits, const Segment& to, uint8_t* __restrict escapes) {
  uint8_t exponents[kSegment];
  uint64_t groups[kSegment / kGroup];
  uint8_t* __restrict const mantissas = to.mantissas;
  for (int64_t i = 0; i < kSegment; ++i) {
    exponents[i] = static_cast<uint8_t>(bits[i] >> 7);
    mantissas[i] = static_cast<uint8_t>((bits[i] >> 8 & 0x80) | (bits[i] & 0x7f));
  }
  for (int64_t b = 0; b < kSegment / kBlock; ++b) {
    const uint8_t first = to.first[b] = first_exponent(exponents + b * kBlock);
    uint8_t codes[kBlock];
    for (int i = 0; i < kBlock; ++i) {  // first is at most 249, so smaller exponents wrap to 7 or more
      codes[i] = std::min<uint8_t>(exponents[b * kBlock + i] - first, kWindow);
    }
    std::memcpy(groups + b * (kBlock / kGroup), codes, kBlock);
  }
  uint16_t* __restrict const low = to.low;
  uint8_t* __restrict const high = to.high;
  for (int64_t g = 0; g < kSegment / kGroup; ++g) {
    uint64_t word = groups[g];
    word = (word | word >> 5) & 0x003f003f003f003fu;
    word = (word | word >> 10) & 0x00000fff00000fffu;
    word = word | word >> 20;
    low[g] = static_cast<uint16_t>(word);
    high[g] = static_cast<uint8_t>(word >> 16);
  }
  int64_t num_escapes = 0;
  for (int64_t g = 0; g < kSegment / kGroup; ++g) {
    for (uint64_t left = escapes_of(groups[g]); left; left &= left - 1) {
      escapes[num_escapes++] = exponents[g * kGroup + __builtin_ctzll(left) / 8];
    }
  }
  return num_escapes;
}

// Unpacks a segment; `escapes` begins with its own, and has `num_escapes` at most.
ALST_CLONES void unpack_segment(const Segment& of, const uint8_t* escapes, int64_t num_escapes, uint16_t* bits_out) {
  uint64_t groups[kSegment / kGroup];
  for (int64_t g = 0; g < kSegment / kGroup; ++g) {
    uint64_t word = of.low[g] | uint64_t(of.high[g]) << 16;
    word = (word | word << 20) & 0x00000fff00000fffu;
    word = (word | word << 10) & 0x003f003f003f003fu;
    groups[g] = (word | word << 5) & 0x0707070707070707u;
  }
  uint8_t exponents[kSegment];
  std::memcpy(exponents, groups, kSegment);
  for (int64_t b = 0; b < kSegment / kBlock; ++b) {
    const uint8_t first = of.first[b];
    for (int i = 0; i < kBlock; ++i) exponents[b * kBlock + i] += first;
  }
  for (int64_t g = 0; g < kSegment / kGroup; ++g) {
    for (uint64_t left = escapes_of(groups[g]); left && num_escapes > 0; left &= left - 1, --num_escapes) {
      exponents[g * kGroup + __builtin_ctzll(left) / 8] = *escapes++;
    }
  }
  const uint8_t* __restrict const mantissas = of.mantissas;
  uint16_t* __restrict const bits = bits_out;
  for (int64_t i = 0; i < kSegment; ++i) {
    bits[i] = static_cast<uint16_t>((mantissas[i] & 0x80) << 8 | exponents[i] << 7 | (mantissas[i] & 0x7f));
  }
}

int64_t segments_of(int64_t n) { return (n + kSegment - 1) / kSegment; }

void pack_bits(Tensor bits_n, Tensor packed_m) {
  const auto* const bits = static_cast<const uint16_t*>(bits_n.const_data_ptr());
  const int64_t n = bits_n.numel();
  const Packed packed = {static_cast<uint8_t*>(packed_m.mutable_data_ptr()), segments_of(n)};
  std::atomic<int64_t> count = 0;
  torch::stable::parallel_for(0, packed.num_segments, kGrain, [&](int64_t from, int64_t to) {
    uint8_t escapes[kSegment];
    uint16_t last[kSegment];
    for (int64_t i = from; i < to; ++i) {
      const uint16_t* values = bits + i * kSegment;
      if (const int64_t size = n - i * kSegment; size < kSegment) {
        std::fill(std::copy(values, values + size, last), last + kSegment, values[size - 1]);
        values = last;
      }
      const Segment segment = packed.segment(i);
      const int64_t num_escapes = pack_segment(values, segment, escapes);
      const int64_t start = *segment.start = count.fetch_add(num_escapes);
      const int64_t fits = std::clamp<int64_t>(packed.room() - start, 0, num_escapes);
      if (fits) std::copy(escapes, escapes + fits, packed.escapes() + start);
    }
  });
  const int64_t header[] = {count, 0};
  std::memcpy(packed.begin, header, kHeader);
  std::fill(packed.escapes() + std::min<int64_t>(count, packed.room()), packed.escapes() + packed.room(), 0);
}

void unpack_bits(Tensor packed_m, Tensor bits_n) {
  auto* const bits = static_cast<uint16_t*>(bits_n.mutable_data_ptr());
  const int64_t n = bits_n.numel();
  const Packed packed = {static_cast<uint8_t*>(packed_m.mutable_data_ptr()), segments_of(n)};
  torch::stable::parallel_for(0, packed.num_segments, kGrain, [&](int64_t from, int64_t to) {
    uint16_t last[kSegment];
    for (int64_t i = from; i < to; ++i) {
      const Segment segment = packed.segment(i);
      const int64_t start = std::clamp<int64_t>(*segment.start, 0, packed.room());
      const int64_t size = std::min(kSegment, n - i * kSegment);
      uint16_t* const values = size < kSegment ? last : bits + i * kSegment;
      unpack_segment(segment, packed.escapes() + start, packed.room() - start, values);
      if (size < kSegment) std::copy(last, last + size, bits + i * kSegment);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) {
  library.impl("pack_bits_", TORCH_BOX(&pack_bits));
  library.impl("unpack_bits_", TORCH_BOX(&unpack_bits));
}
