// Runs the body of the CUDA kernel of sum_pieces on the CPU, for every block and thread of a grid, one after another.
//
// Arguments: types of pieces and out (0 bf16, 1 fp16, 2 fp32), P, n, stride, scale, accumulate, blocks, threads, and by how
// many elements pieces and out miss a 16-byte boundary. Reads pieces and out from stdin, writes out to stdout, and the
// widths that were chosen to stderr. Both lie at the very end of their allocations, so a sanitizer sees what goes beyond.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "sum_pieces.h"

using namespace alst;

template <typename In, typename Out>
static void run(Sum sum, int64_t blocks, int64_t threads) {
  decide_widths<In, Out>(sum);
  std::fprintf(stderr, "loads %d stores %d", sum.wide_loads, sum.wide_stores);
  for (int64_t thread = 0; thread < blocks * threads; ++thread) sum_spans<In, Out>(sum, thread, blocks * threads);
}

template <typename In>
static void run_to(int out, const Sum& sum, int64_t blocks, int64_t threads) {
  if (out == 0) run<In, Bf16>(sum, blocks, threads);
  if (out == 1) run<In, Fp16>(sum, blocks, threads);
  if (out == 2) run<In, Fp32>(sum, blocks, threads);
}

static std::unique_ptr<char[]> read_at(int64_t bytes, int64_t offset) {
  std::unique_ptr<char[]> data(new char[offset + bytes]);
  if (std::fread(data.get() + offset, 1, bytes, stdin) != size_t(bytes)) std::exit(2);
  return data;
}

int main(int, char** argument) {
  const auto number = [&](int i) { return std::atoll(argument[i]); };
  const int in = int(number(1)), out = int(number(2));
  const int64_t in_size = in == 2 ? 4 : 2, out_size = out == 2 ? 4 : 2;
  Sum sum = {};
  sum.num_pieces = number(3);
  sum.n = number(4);
  sum.stride = number(5);
  sum.scale = float(std::atof(argument[6]));
  sum.accumulate = number(7) != 0;
  const int64_t piece_miss = number(10) * in_size, out_miss = number(11) * out_size;
  const auto pieces = read_at(((sum.num_pieces - 1) * sum.stride + sum.n) * in_size, piece_miss);
  const auto out_data = read_at(sum.n * out_size, out_miss);
  sum.pieces = pieces.get() + piece_miss;
  sum.out = out_data.get() + out_miss;
  if (in == 0) run_to<Bf16>(out, sum, number(8), number(9));
  if (in == 1) run_to<Fp16>(out, sum, number(8), number(9));
  if (in == 2) run_to<Fp32>(out, sum, number(8), number(9));
  std::fwrite(sum.out, out_size, sum.n, stdout);
}
