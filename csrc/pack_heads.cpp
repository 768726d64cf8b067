// pack_heads and unpack_heads_ on CPU: what an all-to-all sends and has received; definitions in kernels/head_layout.py.
//
// Sums of two copies are unpacked in 0.5 to 0.6 of torch's time, q, k and v packed in 0.7 to 1.1 of its three copies';
// one tensor by itself takes what torch's copy takes. Stores past the cache made all of them slower.
//
// Legend: P ranks, s tokens, B batch, g pieces of a tensor, m = P/g ranks that each piece belongs to, h heads, D head dim.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "dtypes.h"

namespace {

using namespace alst;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokens = 8;     // of each rank in turn: few enough that a piece for many ranks is read once
constexpr int64_t kGrain = 65536;  // bytes below which a second thread costs more than it saves
constexpr int64_t kSum = 1024;     // fp32 sums that stay in L1

// A tensor's pieces [g, s, B, h, D] and their place in the buffer [P, s, B, W]; all in bytes.
struct Part {
  char* data;
  int64_t pieces, copies;
  int64_t g_stride, s_stride, B_stride;
  int64_t runs, run, run_stride;  // what lies side by side of a token: all heads, or each
  int64_t first;
};

struct Wire {
  char* data;
  int64_t P, s, B, row;
  char* at(int64_t rank, int64_t token, int64_t b) const { return data + ((rank * s + token) * B + b) * row; }
};

int64_t item_bytes(ScalarType dtype) {
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
      "pack_heads: bf16, fp16 or fp32");
  return dtype == ScalarType::Float ? 4 : 2;
}

std::vector<Part> parts_of(const std::vector<Tensor>& pieces, int64_t P) {
  STD_TORCH_CHECK(!pieces.empty(), "pack_heads: no tensors");
  const int64_t item = item_bytes(pieces[0].scalar_type());
  std::vector<Part> parts;
  int64_t first = 0;
  for (const Tensor& x : pieces) {
    STD_TORCH_CHECK(
        x.dim() == 5 && x.scalar_type() == pieces[0].scalar_type() && x.size(0) >= 1 && P % x.size(0) == 0 &&
            x.size(1) == pieces[0].size(1) && x.size(2) == pieces[0].size(2) && (x.size(4) < 2 || x.stride(4) == 1),
        "pack_heads: pieces must be [g, s, B, h, D], of one dtype, with g a divisor of the ranks");
    const int64_t h = x.size(3), D = x.size(4);
    const bool whole = h == 1 || x.stride(3) == D;
    parts.push_back(
        {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.size(0), P / x.size(0), x.stride(0) * item,
         x.stride(1) * item, x.stride(2) * item, whole ? 1 : h, (whole ? h * D : D) * item, x.stride(3) * item, first});
    first += h * D * item;
  }
  return parts;
}

int64_t row_bytes(const std::vector<Part>& parts) { return parts.back().first + parts.back().runs * parts.back().run; }

// Calls move(part, its token, the wire's first token) for every token of every part.
template <typename Move>
void for_each_token(const std::vector<Part>& parts, const Wire& wire, const Move& move) {
  const int64_t blocks = (wire.s + kTokens - 1) / kTokens;
  const int64_t bytes = std::max<int64_t>(1, kTokens * wire.P * wire.B * wire.row);
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / bytes), [&](int64_t from, int64_t to) {
    for (int64_t begin = from * kTokens; begin < std::min(to * kTokens, wire.s); begin += kTokens) {
      const int64_t end = std::min(begin + kTokens, wire.s);
      for (const Part& part : parts) {
        for (int64_t g = 0; g < part.pieces; ++g) {
          for (int64_t token = begin; token < end; ++token) {
            for (int64_t b = 0; b < wire.B; ++b) {
              move(
                  part, part.data + g * part.g_stride + token * part.s_stride + b * part.B_stride,
                  wire.at(g * part.copies, token, b) + part.first);
            }
          }
        }
      }
    }
  });
}

Tensor pack_heads(std::vector<Tensor> pieces, int64_t num_ranks) {
  const std::vector<Part> parts = parts_of(pieces, num_ranks);
  const int64_t s = pieces[0].size(1), B = pieces[0].size(2), row = row_bytes(parts);
  Tensor out = torch::stable::new_empty(pieces[0], {num_ranks, s, B, row / item_bytes(pieces[0].scalar_type())});
  const Wire wire = {static_cast<char*>(out.mutable_data_ptr()), num_ranks, s, B, row};
  const int64_t to_next_rank = s * B * row;
  for_each_token(parts, wire, [&](const Part& part, const char* x, char* place) {
    for (int64_t copy = 0; copy < part.copies; ++copy) {
      for (int64_t i = 0; i < part.runs; ++i) {
        std::memcpy(place + copy * to_next_rank + i * part.run, x + i * part.run_stride, part.run);
      }
    }
  });
  return out;
}

// The sum of m runs that are `step` bytes apart, in fp32 and in the order of ranks, rounded once.
template <typename T>
ALST_INLINE void add_runs(const char* from, int64_t step, int64_t m, char* to, int64_t bytes) {
  using Stored = typename T::Stored;
  alignas(64) float total[kSum];
  const int64_t n = bytes / static_cast<int64_t>(sizeof(Stored));
  for (int64_t begin = 0; begin < n; begin += kSum) {
    const int64_t count = std::min(kSum, n - begin);
    const auto* x = reinterpret_cast<const Stored*>(from) + begin;
    for (int64_t i = 0; i < count; ++i) total[i] = T::widen(x[i]);
    for (int64_t k = 1; k < m; ++k) {
      const auto* next = reinterpret_cast<const Stored*>(from + k * step) + begin;
      for (int64_t i = 0; i < count; ++i) total[i] += T::widen(next[i]);
    }
    auto* __restrict sum = reinterpret_cast<Stored*>(to) + begin;
    for (int64_t i = 0; i < count; ++i) sum[i] = T::narrow(total[i]);
  }
}

ALST_CLONES void add_bf16(const char* x, int64_t step, int64_t m, char* y, int64_t n) { add_runs<Bf16>(x, step, m, y, n); }
ALST_CLONES void add_fp16(const char* x, int64_t step, int64_t m, char* y, int64_t n) { add_runs<Fp16>(x, step, m, y, n); }
ALST_CLONES void add_fp32(const char* x, int64_t step, int64_t m, char* y, int64_t n) { add_runs<Fp32>(x, step, m, y, n); }

void unpack_heads_(Tensor received, std::vector<Tensor> pieces) {
  const std::vector<Part> parts = parts_of(pieces, received.size(0));
  const auto dtype = received.scalar_type();
  const int64_t s = pieces[0].size(1), B = pieces[0].size(2), row = row_bytes(parts);
  STD_TORCH_CHECK(
      received.is_contiguous() && received.dim() == 4 && dtype == pieces[0].scalar_type() && received.size(1) == s &&
          received.size(2) == B && received.size(3) * item_bytes(dtype) == row,
      "unpack_heads_: the buffer must be [P, s, B, W], contiguous, of the pieces' dtype");
  const auto add = dtype == ScalarType::BFloat16 ? add_bf16 : dtype == ScalarType::Half ? add_fp16 : add_fp32;
  const Wire wire = {static_cast<char*>(const_cast<void*>(received.const_data_ptr())), received.size(0), s, B, row};
  const int64_t to_next_rank = s * B * row;
  for_each_token(parts, wire, [&](const Part& part, char* x, const char* place) {
    for (int64_t i = 0; i < part.runs; ++i) {
      if (part.copies == 1) {
        std::memcpy(x + i * part.run_stride, place + i * part.run, part.run);
      } else {
        add(place + i * part.run, to_next_rank, part.copies, x + i * part.run_stride, part.run);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) {
  library.impl("pack_heads", TORCH_BOX(&pack_heads));
  library.impl("unpack_heads_", TORCH_BOX(&unpack_heads_));
}
