// rope on CPU: queries and keys are rotated, out of place; the definition is in kernels/rope_ops.py.
//
// Legend: B batch, s tokens, D elements of a head, W entries of a token in cos and sin.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "dtypes.h"

namespace {

using namespace alst;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A token's tables in fp32, one entry a pair, and where the pairs are.
struct Turn {
  const float *cos_a, *cos_b, *sin_a, *sin_b;
  int64_t half, D;
  bool interleaved;
};

template <typename In>
ALST_INLINE void turn(const void* from, void* to, const Turn& t) {
  using Stored = typename In::Stored;
  const auto* __restrict x = static_cast<const Stored*>(from);
  auto* __restrict y = static_cast<Stored*>(to);
  if (t.interleaved) {
    for (int64_t i = 0; i < t.half; ++i) {
      const float a = In::widen(x[2 * i]), b = In::widen(x[2 * i + 1]);
      y[2 * i] = In::narrow(a * t.cos_a[i] - b * t.sin_a[i]);
      y[2 * i + 1] = In::narrow(b * t.cos_b[i] + a * t.sin_b[i]);
    }
  } else {
    for (int64_t i = 0; i < t.half; ++i) {
      const float a = In::widen(x[i]), b = In::widen(x[i + t.half]);
      y[i] = In::narrow(a * t.cos_a[i] - b * t.sin_a[i]);
      y[i + t.half] = In::narrow(b * t.cos_b[i] + a * t.sin_b[i]);
    }
  }
  std::copy(x + 2 * t.half, x + t.D, y + 2 * t.half);
}

ALST_CLONES void turn_bf16(const void* x, void* y, const Turn& t) { turn<Bf16>(x, y, t); }
ALST_CLONES void turn_fp16(const void* x, void* y, const Turn& t) { turn<Fp16>(x, y, t); }
ALST_CLONES void turn_fp32(const void* x, void* y, const Turn& t) { turn<Fp32>(x, y, t); }

using Turning = void (*)(const void*, void*, const Turn&);

Turning turning_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? turn_bf16 : dtype == ScalarType::Half ? turn_fp16 : turn_fp32;
}

bool is_known(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
}

int64_t bytes_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

// Heads in memory, [B, s, heads, D] of any strides but the last, and where they go.
struct Heads {
  const char* from;
  char* to;
  int64_t batch, token, head, count, bytes;

  Heads(const Tensor& x, Tensor& y)
      : from(static_cast<const char*>(x.const_data_ptr())),
        to(static_cast<char*>(y.mutable_data_ptr())),
        batch(x.stride(0) * bytes_of(x)),
        token(x.stride(1) * bytes_of(x)),
        head(x.stride(2) * bytes_of(x)),
        count(x.size(2)),
        bytes(x.size(3) * bytes_of(x)) {}

  void turn_token(int64_t b, int64_t at, int64_t s, const Turn& t, Turning turning) const {
    const char* x = from + b * batch + at * token;
    char* y = to + (b * s + at) * count * bytes;
    for (int64_t i = 0; i < count; ++i) turning(x + i * head, y + i * bytes, t);
  }
};

// A table of cos or sin, [B or 1, s, W].
struct Table {
  const void* data;
  ScalarType dtype;
  int64_t batch, token;

  explicit Table(const Tensor& table)
      : data(table.const_data_ptr()),
        dtype(table.scalar_type()),
        batch(table.size(0) > 1 ? table.stride(0) : 0),
        token(table.stride(1)) {}

  // Every `step`-th of a token's entries, `half` of them, times `sign`.
  void gather(int64_t b, int64_t at, int64_t begin, int64_t step, int64_t half, float sign, float* to) const {
    const int64_t row = b * batch + at * token + begin;
    switch (dtype) {
      case ScalarType::BFloat16: return widen<Bf16>(row, step, half, sign, to);
      case ScalarType::Half: return widen<Fp16>(row, step, half, sign, to);
      default: return widen<Fp32>(row, step, half, sign, to);
    }
  }

  template <typename In>
  void widen(int64_t row, int64_t step, int64_t half, float sign, float* to) const {
    const auto* stored = static_cast<const typename In::Stored*>(data) + row;
    for (int64_t i = 0; i < half; ++i) to[i] = sign * In::widen(stored[i * step]);
  }
};

void check(const Tensor& x, int64_t dims, const char* what) {
  STD_TORCH_CHECK(
      is_known(x.scalar_type()) && x.dim() == dims && (x.numel() == 0 || x.size(-1) == 1 || x.stride(-1) == 1),
      "rope: ", what, " must be bf16, fp16 or fp32, and contiguous in its last dimension");
}

std::tuple<Tensor, Tensor> rope(
    Tensor q_BshD,
    Tensor k_BsgD,
    Tensor cos_BsW,
    Tensor sin_BsW,
    int64_t rotary,
    bool interleaved,
    bool shared,
    bool inverse) {
  check(q_BshD, 4, "q");
  check(k_BsgD, 4, "k");
  check(cos_BsW, 3, "cos");
  check(sin_BsW, 3, "sin");
  const int64_t B = q_BshD.size(0), s = q_BshD.size(1), D = q_BshD.size(3), half = rotary / 2;
  const auto fits = [&](const Tensor& table) {
    return (table.size(0) == 1 || table.size(0) == B) && table.size(1) == s && table.size(2) >= (shared ? half : rotary);
  };
  STD_TORCH_CHECK(
      k_BsgD.size(0) == B && k_BsgD.size(1) == s && k_BsgD.size(3) == D && rotary <= D && fits(cos_BsW) &&
          fits(sin_BsW) && k_BsgD.scalar_type() == q_BshD.scalar_type(),
      "rope: q, k, cos and sin do not fit together");
  Tensor to_q = torch::stable::new_empty(q_BshD, {B, s, q_BshD.size(2), D});
  Tensor to_k = torch::stable::new_empty(k_BsgD, {B, s, k_BsgD.size(2), D});
  const Heads q(q_BshD, to_q), k(k_BsgD, to_k);
  const Table cos(cos_BsW), sin(sin_BsW);
  const auto turning = turning_of(q_BshD.scalar_type());
  // Where a pair's second entry is, and how far two pairs' are apart.
  const int64_t second = shared ? 0 : interleaved ? 1 : half, step = interleaved && !shared ? 2 : 1;
  const float sign = inverse ? -1.0f : 1.0f;
  torch::stable::parallel_for(0, B * s, 16, [&](int64_t from, int64_t to) {
    std::vector<float> rows(4 * half);
    float *cos_a = rows.data(), *cos_b = cos_a + half, *sin_a = cos_b + half, *sin_b = sin_a + half;
    const Turn t = {cos_a, cos_b, sin_a, sin_b, half, D, interleaved};
    for (int64_t i = from; i < to; ++i) {
      const int64_t b = i / s, at = i % s;
      cos.gather(b, at, 0, step, half, 1.0f, cos_a);
      cos.gather(b, at, second, step, half, 1.0f, cos_b);
      sin.gather(b, at, inverse ? second : 0, step, half, sign, sin_a);
      sin.gather(b, at, inverse ? 0 : second, step, half, sign, sin_b);
      q.turn_token(b, at, s, t, turning);
      k.turn_token(b, at, s, t, turning);
    }
  });
  return {to_q, to_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) { library.impl("rope", TORCH_BOX(&rope)); }
