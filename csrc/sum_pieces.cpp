// sum_pieces on CPU, on torch's stable ABI: one binary for torch 2.10 and later. Memory beyond the output: one tile.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "sum_pieces.h"
#include "sum_pieces_tensors.h"

namespace {

using namespace alst;

constexpr int64_t kTile = 1024;    // 4 KiB of fp32, which stays in L1 while all pieces are added
constexpr int64_t kGrain = 32768;  // fewer elements do not amortize a second thread

template <typename In>
ALST_INLINE void add_pieces(const Sum& sum, int64_t begin, float* __restrict total, int64_t n) {
  const auto* from = static_cast<const typename In::Stored*>(sum.pieces) + begin;
  for (int64_t i = 0; i < n; ++i) total[i] = In::widen(from[i]);
  for (int64_t k = 1; k < sum.num_pieces; ++k) {
    from += sum.stride;
    for (int64_t i = 0; i < n; ++i) total[i] += In::widen(from[i]);
  }
}

template <typename Out>
ALST_INLINE void store(const Sum& sum, int64_t begin, const float* __restrict total, int64_t n) {
  auto* __restrict to = static_cast<typename Out::Stored*>(sum.out) + begin;
  if (sum.accumulate) {
    for (int64_t i = 0; i < n; ++i) to[i] = Out::narrow(Out::widen(to[i]) + total[i] * sum.scale);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = Out::narrow(total[i] * sum.scale);
  }
}

ALST_CLONES void add_pieces_bf16(const Sum& s, int64_t begin, float* t, int64_t n) { add_pieces<Bf16>(s, begin, t, n); }
ALST_CLONES void add_pieces_fp16(const Sum& s, int64_t begin, float* t, int64_t n) { add_pieces<Fp16>(s, begin, t, n); }
ALST_CLONES void add_pieces_fp32(const Sum& s, int64_t begin, float* t, int64_t n) { add_pieces<Fp32>(s, begin, t, n); }
ALST_CLONES void store_bf16(const Sum& s, int64_t begin, const float* t, int64_t n) { store<Bf16>(s, begin, t, n); }
ALST_CLONES void store_fp16(const Sum& s, int64_t begin, const float* t, int64_t n) { store<Fp16>(s, begin, t, n); }
ALST_CLONES void store_fp32(const Sum& s, int64_t begin, const float* t, int64_t n) { store<Fp32>(s, begin, t, n); }

template <typename Function>
Function of_dtype(ScalarType dtype, Function bf16, Function fp16, Function fp32) {
  return dtype == ScalarType::BFloat16 ? bf16 : dtype == ScalarType::Half ? fp16 : fp32;
}

void sum_pieces(Tensor pieces_Pn, Tensor out_n, double scale, bool accumulate) {
  const Sum sum = sum_of(pieces_Pn, out_n, scale, accumulate);
  const auto add_tile = of_dtype(pieces_Pn.scalar_type(), add_pieces_bf16, add_pieces_fp16, add_pieces_fp32);
  const auto store_tile = of_dtype(out_n.scalar_type(), store_bf16, store_fp16, store_fp32);
  torch::stable::parallel_for(0, sum.n, kGrain, [&](int64_t from, int64_t to) {
    alignas(64) float total[kTile];
    for (int64_t begin = from; begin < to; begin += kTile) {
      const int64_t n = std::min(kTile, to - begin);
      add_tile(sum, begin, total, n);
      store_tile(sum, begin, total, n);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) { library.impl("sum_pieces", TORCH_BOX(&sum_pieces)); }
