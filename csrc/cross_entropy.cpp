// cross_entropy_ on CPU: a tile of logits becomes its gradient in place; the definition is in kernels/cross_entropy.py.
//
// Legend: t rows, V logits a row. A row is read for its normaliser, and read again and written for its gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dtypes.h"
#include "maths.h"

namespace {

using namespace alst;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // logits in fp32 that stay in L1
constexpr int kLanes = 32;        // sums side by side, as vector registers hold them
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kIgnored = -100;

struct Options {
  float scale;      // of the gradient
  float smoothing;
  float softcap;    // 0: none
  float logit_scale;
  bool gradient;    // whether it is wanted
};

struct Norm {
  float highest;
  double total;  // of exp(z - highest)
  double sum_z;
};

// A block's logits as the loss sees them; what is beyond the row is -infinity.
template <typename In>
ALST_INLINE void read_block(const typename In::Stored* x, int64_t n, const Options& o, float* __restrict z) {
  for (int64_t i = 0; i < n; ++i) z[i] = In::widen(x[i]) * o.logit_scale;
  if (o.softcap != 0) {
    const float inverse = 1.0f / o.softcap;
    for (int64_t i = 0; i < n; ++i) z[i] = o.softcap * tanh_of(z[i] * inverse);
  }
  for (int64_t i = n; i < kBlock; ++i) z[i] = -kInfinity;
}

template <typename In>
ALST_INLINE void add_block(const void* row, int64_t begin, int64_t n, const Options& o, Norm& norm) {
  alignas(64) float z[kBlock];
  alignas(64) float lanes[kLanes];
  read_block<In>(static_cast<const typename In::Stored*>(row) + begin, n, o, z);
  if (o.smoothing != 0) norm.sum_z = std::accumulate(z, z + n, norm.sum_z);
  std::fill(lanes, lanes + kLanes, norm.highest);
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = choose(z[i + k] > lanes[k], z[i + k], lanes[k]);
  }
  const float highest = *std::max_element(lanes, lanes + kLanes);
  const float base = highest == -kInfinity ? 0.0f : highest;  // of -infinity alone: their difference is NaN
  std::fill(lanes, lanes + kLanes, 0.0f);
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += exp_of(z[i + k] - base);
  }
  norm.total = norm.total * exp_of(norm.highest - base) + std::accumulate(lanes, lanes + kLanes, 0.0);
  norm.highest = highest;
}

template <typename In>
ALST_INLINE void differentiate(void* row, int64_t begin, int64_t n, const Options& o, const Norm& norm, float uniform) {
  alignas(64) float z[kBlock];
  auto* __restrict x = static_cast<typename In::Stored*>(row) + begin;
  read_block<In>(x, n, o, z);
  const float share = static_cast<float>(1.0 / norm.total), factor = o.scale * o.logit_scale;
  if (o.softcap == 0) {
    for (int64_t i = 0; i < n; ++i) x[i] = In::narrow((exp_of(z[i] - norm.highest) * share - uniform) * factor);
    return;
  }
  const float inverse = 1.0f / o.softcap;
  for (int64_t i = 0; i < n; ++i) {
    const float capped = z[i] * inverse;
    const float grad = (exp_of(z[i] - norm.highest) * share - uniform) * (1.0f - capped * capped);
    x[i] = In::narrow(grad * factor);
  }
}

ALST_CLONES void add_bf16(const void* x, int64_t b, int64_t n, const Options& o, Norm& r) { add_block<Bf16>(x, b, n, o, r); }
ALST_CLONES void add_fp16(const void* x, int64_t b, int64_t n, const Options& o, Norm& r) { add_block<Fp16>(x, b, n, o, r); }
ALST_CLONES void add_fp32(const void* x, int64_t b, int64_t n, const Options& o, Norm& r) { add_block<Fp32>(x, b, n, o, r); }
ALST_CLONES void grad_bf16(void* x, int64_t b, int64_t n, const Options& o, const Norm& r, float u) {
  differentiate<Bf16>(x, b, n, o, r, u);
}
ALST_CLONES void grad_fp16(void* x, int64_t b, int64_t n, const Options& o, const Norm& r, float u) {
  differentiate<Fp16>(x, b, n, o, r, u);
}
ALST_CLONES void grad_fp32(void* x, int64_t b, int64_t n, const Options& o, const Norm& r, float u) {
  differentiate<Fp32>(x, b, n, o, r, u);
}

struct Kernels {
  void (*add)(const void*, int64_t, int64_t, const Options&, Norm&);
  void (*differentiate)(void*, int64_t, int64_t, const Options&, const Norm&, float);
  float (*read)(const void*, int64_t);
  void (*write)(void*, int64_t, float);
};

template <typename In>
float read_one(const void* row, int64_t i) {
  return In::widen(static_cast<const typename In::Stored*>(row)[i]);
}

template <typename In>
void write_one(void* row, int64_t i, float value) {
  static_cast<typename In::Stored*>(row)[i] = In::narrow(value);
}

constexpr Kernels kBf16 = {add_bf16, grad_bf16, read_one<Bf16>, write_one<Bf16>};
constexpr Kernels kFp16 = {add_fp16, grad_fp16, read_one<Fp16>, write_one<Fp16>};
constexpr Kernels kFp32 = {add_fp32, grad_fp32, read_one<Fp32>, write_one<Fp32>};

// A row without a label counts for nothing; a label that is no token poisons its row.
float unlabelled_row(void* row, int64_t V, float value, const Options& o, const Kernels& kernels) {
  for (int64_t i = 0; o.gradient && i < V; ++i) kernels.write(row, i, value);
  return value;
}

float row_loss(void* row, int64_t V, int64_t label, const Options& o, const Kernels& kernels) {
  if (label == kIgnored) return unlabelled_row(row, V, 0.0f, o, kernels);
  if (label < 0 || label >= V) return unlabelled_row(row, V, kNan, o, kernels);
  float z_label = kernels.read(row, label) * o.logit_scale, slope = o.logit_scale;
  if (o.softcap != 0) {
    const float capped = tanh_of(z_label / o.softcap);
    z_label = o.softcap * capped;
    slope *= 1.0f - capped * capped;
  }
  Norm norm = {-kInfinity, 0.0, 0.0};
  for (int64_t begin = 0; begin < V; begin += kBlock) kernels.add(row, begin, std::min(kBlock, V - begin), o, norm);
  // The highest logit and the sum stay apart: added up, their rounding would be in every probability.
  double loss = static_cast<double>(norm.highest - z_label) + std::log(norm.total);
  if (o.smoothing != 0) loss += o.smoothing * (z_label - norm.sum_z / static_cast<double>(V));
  if (!o.gradient) return static_cast<float>(loss);
  const float uniform = o.smoothing / static_cast<float>(V);
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    kernels.differentiate(row, begin, std::min(kBlock, V - begin), o, norm, uniform);
  }
  // The label's own, of its unrounded logit: probability less one nearly cancels where a token is well known.
  const double probability = std::exp(static_cast<double>(z_label) - norm.highest) / norm.total;
  const double grad = (probability - (1.0 - o.smoothing) - uniform) * slope * o.scale;
  kernels.write(row, label, static_cast<float>(grad));
  return static_cast<float>(loss);
}

Tensor cross_entropy_(
    Tensor logits_tV,
    Tensor labels_t,
    Tensor scale,
    double smoothing,
    double softcap,
    double logit_scale,
    bool gradient) {
  const auto dtype = logits_tV.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
      "cross_entropy_: logits must be bf16, fp16 or fp32");
  STD_TORCH_CHECK(
      labels_t.scalar_type() == ScalarType::Long && labels_t.is_contiguous() && labels_t.dim() == 1 &&
          logits_tV.dim() == 2 && labels_t.size(0) == logits_tV.size(0),
      "cross_entropy_: labels must be [t], int64 and contiguous");
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Float && scale.numel() == 1, "cross_entropy_: scale must be one fp32 number");
  const Options options = {
      *static_cast<const float*>(scale.const_data_ptr()),
      static_cast<float>(smoothing),
      static_cast<float>(softcap),
      static_cast<float>(logit_scale),
      gradient};
  const Kernels& kernels = dtype == ScalarType::BFloat16 ? kBf16 : dtype == ScalarType::Half ? kFp16 : kFp32;
  const int64_t t = logits_tV.size(0), V = logits_tV.size(1);
  const int64_t row_bytes = logits_tV.stride(0) * (dtype == ScalarType::Float ? 4 : 2);
  const auto* labels = static_cast<const int64_t*>(labels_t.const_data_ptr());
  auto* logits = static_cast<char*>(logits_tV.mutable_data_ptr());
  std::vector<float> losses(t);
  torch::stable::parallel_for(0, t, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) losses[i] = row_loss(logits + i * row_bytes, V, labels[i], options, kernels);
  });
  Tensor sum = torch::stable::new_empty(logits_tV, {}, ScalarType::Float);
  *static_cast<float*>(sum.mutable_data_ptr()) =
      static_cast<float>(std::accumulate(losses.begin(), losses.end(), 0.0));
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) { library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_)); }
