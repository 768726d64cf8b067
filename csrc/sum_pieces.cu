// sum_pieces on CUDA, on torch's stable ABI. A separate library, so that the CPU library loads without CUDA.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "sum_pieces.h"
#include "sum_pieces_tensors.h"

namespace {

using namespace alst;

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;  // with more spans, a thread takes several

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) sum_kernel(const Sum sum) {
  sum_spans<In, Out>(sum, int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads);
}

template <typename In, typename Out>
void launch(Sum sum, cudaStream_t stream) {
  decide_widths<In, Out>(sum);
  const int64_t num_spans = (sum.n + kSpan<In> - 1) / kSpan<In>;
  const int64_t blocks = std::min((num_spans + kThreads - 1) / kThreads, kMostBlocks);
  sum_kernel<In, Out><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(sum);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In>
void launch_to(ScalarType out, const Sum& sum, cudaStream_t stream) {
  if (out == ScalarType::BFloat16) return launch<In, Bf16>(sum, stream);
  if (out == ScalarType::Half) return launch<In, Fp16>(sum, stream);
  launch<In, Fp32>(sum, stream);
}

void sum_pieces(Tensor pieces_Pn, Tensor out_n, double scale, bool accumulate) {
  const Sum sum = sum_of(pieces_Pn, out_n, scale, accumulate);
  if (sum.n == 0) return;  // an empty grid is a CUDA launch error
  const auto device = pieces_Pn.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto in = pieces_Pn.scalar_type();
  if (in == ScalarType::BFloat16) return launch_to<Bf16>(out_n.scalar_type(), sum, cuda_stream);
  if (in == ScalarType::Half) return launch_to<Fp16>(out_n.scalar_type(), sum, cuda_stream);
  launch_to<Fp32>(out_n.scalar_type(), sum, cuda_stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CUDA, library) { library.impl("sum_pieces", TORCH_BOX(&sum_pieces)); }
