// How kernels are started: the shared memory that they may have, their type and rank, and how their
// work is cut into blocks.
#pragma once

#include <mutex>
#include <set>
#include <utility>

#include "device.cuh"

namespace reslora::cuda {

/// What a kernel may have of shared memory unasked.
constexpr size_t kUnaskedBytes = 48 * 1024;
/// What every device has for a block that asks, from compute capability 8.0 on: some have just
/// that.
constexpr size_t kLeastBytes = 99 * 1024;

/// How many blocks with so much shared memory fit beside one another in an H100's multiprocessor.
/// Told this, the compiler uses the registers that shared memory leaves idle.
constexpr int blocks_beside(size_t bytes) { return static_cast<int>(228 * 1024 / (bytes + 1024)); }

/// Sets `*bytes` to what a block on this device may have at most.
inline cudaError_t most_shared_bytes(size_t* bytes) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<size_t>(most);
  return error;
}

/// Lets a kernel have `bytes` of shared memory; asks once for each kernel and device.
template <typename Kernel>
cudaError_t allow(Kernel kernel, size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<Kernel, int>> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

/// Starts a kernel with `shared_bytes` of dynamic shared memory, the same at each of its launches.
template <typename Kernel, typename... Args>
cudaError_t start(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                  const Args&... args) {
  if (shared_bytes > kUnaskedBytes) {
    const cudaError_t error = allow(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

/// Runs the launcher for the rank padded to 16, 32, 64 or 128, up to kMost.
template <typename T, template <typename, int> class Launcher, int64_t kMost, typename Args>
cudaError_t for_rank(int64_t rank, const Args& args, cudaStream_t stream) {
  if (rank > kMost) return cudaErrorInvalidValue;
  if (rank <= 16) return Launcher<T, 16>::run(args, stream);
  if constexpr (kMost > 32) {
    if (rank > 64) return Launcher<T, 128>::run(args, stream);
    if (rank > 32) return Launcher<T, 64>::run(args, stream);
  }
  return Launcher<T, 32>::run(args, stream);
}

/// Runs the launcher for the type and rank.
template <template <typename, int> class Launcher, int64_t kMost = kMaxRank, typename Args>
cudaError_t dispatch(int64_t rank, const Args& args, cudaStream_t stream) {
  if (args.type == Type::kBFloat16) return for_rank<bfloat16, Launcher, kMost>(rank, args, stream);
  return for_rank<half, Launcher, kMost>(rank, args, stream);
}

/// Cuts `steps` of each tile into ranges so that the multiprocessors end together: with the fewest
/// ranges that keep two blocks on each busy for nine tenths of the time, or else with those that
/// keep them busiest. A block has at least two steps where there are two, since each range costs a
/// partial sum, written and read.
inline Cut cut_into(int64_t tiles, int64_t steps, int multiprocessors) {
  Cut best = {tiles, steps < 1 ? 1 : steps, 1};
  if (tiles < 1 || steps < 1) return best;
  const int64_t most = smaller(steps / 2, ceil_div(int64_t{8} * multiprocessors, tiles));
  double busiest = 0;
  for (int64_t wanted = 1; wanted <= most && busiest < 0.9; ++wanted) {
    const int64_t range = ceil_div(steps, wanted), ranges = ceil_div(steps, range);
    const int64_t each = ceil_div(tiles * ranges, multiprocessors);  // blocks of one multiprocessor
    const int64_t room = multiprocessors * (each < 2 ? 2 : each) * range;
    const double busy = static_cast<double>(tiles * steps) / static_cast<double>(room);
    if (busy <= busiest) continue;
    busiest = busy;
    best = {tiles, range, ranges};
  }
  return best;
}

}  // namespace reslora::cuda
