// See emulator.h.
#include "emulator.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <vector>

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32;
constexpr size_t kUnasked = 48 * 1024;  // bytes of shared memory

/// A barrier for a fixed number of threads. All must come from the same kind of place.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), missing_(threads) {}

  void wait(int kind) {
    const int phase = phase_.load();
    int expected = 0;
    if (!kind_.compare_exchange_strong(expected, kind))
      require(expected == kind, "threads of a block wait at different barriers");
    if (missing_.fetch_sub(1) > 1) {
      phase_.wait(phase);
      return;
    }
    missing_ = threads_;
    kind_ = 0;
    phase_ = phase + 1;
    phase_.notify_all();
  }

 private:
  const int threads_;
  std::atomic<int> missing_;
  std::atomic<int> kind_{0};
  std::atomic<int> phase_{0};
};

struct Warp {
  Barrier barrier{kWarp};
  float values[kWarp];
};

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps(threads / kWarp) {}

  void renew_memory(size_t bytes) {
    void* fresh = nullptr;
    require(posix_memalign(&fresh, 128, bytes ? bytes : 1) == 0, "no memory is left");
    std::memset(fresh, 0xff, bytes);  // NaN as bf16, fp16 and fp32
    memory.reset(static_cast<unsigned char*>(fresh));
  }

  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, FreeMemory> memory;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t zeros;
};

enum Kind { kInside = 1, kAround = 2 };

int64_t launched = 0;
thread_local Block* block_here = nullptr;
thread_local Warp* warp_here = nullptr;
thread_local int lane_here = 0;
thread_local std::vector<Copy> open_group;
thread_local std::deque<std::vector<Copy>> closed_groups;

struct Region {
  std::string name;
  uintptr_t first;
  size_t bytes;
  std::atomic<uint64_t> read{0}, written{0};
  std::vector<std::atomic<bool>> is_read;
};
std::vector<std::unique_ptr<Region>> regions;

Region* region_of(const void* address) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  for (auto& region : regions)
    if (place >= region->first && place < region->first + region->bytes) return region.get();
  return nullptr;
}

void check_alignment(const void* address, size_t bytes) {
  require(reinterpret_cast<uintptr_t>(address) % bytes == 0, "a global access is not aligned");
}

using KernelOnDevice = std::pair<const void*, int>;

std::map<KernelOnDevice, int>& allowed_memory() {
  static std::map<KernelOnDevice, int> allowed;
  return allowed;
}

std::atomic<int> allowances{0};

uint3 block_at(uint64_t index, const dim3& grid) {
  return {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
          static_cast<unsigned>(index / grid.x / grid.y)};
}

}  // namespace

Options& options() {
  static Options all;
  return all;
}

void require(bool holds, const char* sentence) {
  if (holds) return;
  std::fprintf(stderr, "[cuda_on_cpu] %s\n", sentence);
  std::abort();
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes > options().shared_bytes) return cudaErrorInvalidValue;
  allowed_memory()[{kernel, options().device}] = bytes;
  ++allowances;
  return cudaSuccess;
}

int times_allowed() { return allowances; }

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void(uint3 thread, uint3 block)>& body) {
  if (options().failure != cudaSuccess) return options().failure;
  const auto allowed = allowed_memory().find({kernel, options().device});
  const size_t most = allowed == allowed_memory().end() ? kUnasked : allowed->second;
  const dim3 grid = config.gridDim;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const unsigned threads = config.blockDim.x;
  if (blocks == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 ||
      config.dynamicSmemBytes > most)
    return cudaErrorInvalidConfiguration;
  require(threads % kWarp == 0, "a block is not made of whole warps");
  ++launched;

  Block block(static_cast<int>(threads));
  const auto thread_main = [&](unsigned thread) {
    block_here = &block;
    warp_here = &block.warps[thread / kWarp];
    lane_here = static_cast<int>(thread % kWarp);
    for (uint64_t i = 0; i < blocks; ++i) {
      if (thread == 0) block.renew_memory(config.dynamicSmemBytes);
      block.barrier.wait(kAround);
      body({thread, 0, 0}, block_at(options().is_order_reversed ? blocks - 1 - i : i, grid));
      for (const auto& group : closed_groups)
        require(group.empty(), "a kernel ends with copies that it has not waited for");
      require(open_group.empty(), "a kernel ends with copies that it has not waited for");
      closed_groups.clear();
      block.barrier.wait(kAround);
    }
  };
  std::vector<std::thread> pool;
  for (unsigned thread = 0; thread < threads; ++thread) pool.emplace_back(thread_main, thread);
  for (std::thread& one : pool) one.join();
  return cudaSuccess;
}

int64_t launches() { return launched; }
unsigned char* shared_memory() { return block_here->memory.get(); }
int lane() { return lane_here; }
void block_barrier() { block_here->barrier.wait(kInside); }
void warp_barrier() { warp_here->barrier.wait(kInside); }

float shuffle_down(float value, unsigned distance) {
  warp_here->values[lane_here] = value;
  warp_barrier();
  const unsigned from = static_cast<unsigned>(lane_here) + distance;
  const float result = from < kWarp ? warp_here->values[from] : value;
  warp_barrier();
  return result;
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
  require(bytes == 4 || bytes == 8 || bytes == 16, "an asynchronous copy has 4, 8 or 16 bytes");
  require(zeros <= bytes, "an asynchronous copy has more zeros than bytes");
  check_alignment(to, bytes);
  check_alignment(from, bytes);
  open_group.push_back({to, from, bytes, zeros});
}

void close_group() {
  closed_groups.push_back(std::move(open_group));
  open_group.clear();
}

void copy_all_but(size_t groups) {
  while (closed_groups.size() > groups) {
    for (const auto& [to, from, bytes, zeros] : closed_groups.front()) {
      if (bytes > zeros) std::memcpy(to, from, bytes - zeros);
      std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
    }
    closed_groups.pop_front();
  }
}

void watch(const std::string& name, const void* data, size_t bytes) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->first = reinterpret_cast<uintptr_t>(data);
  region->bytes = bytes;
  region->is_read = std::vector<std::atomic<bool>>(bytes);
  regions.push_back(std::move(region));
}

Traffic traffic_of(const std::string& name) {
  for (const auto& region : regions) {
    if (region->name != name) continue;
    uint64_t once = 0;
    for (const auto& is_read : region->is_read) once += is_read;
    return {region->read, once, region->written};
  }
  require(false, "no such buffer is watched");
  return {};
}

void stop_watching() { regions.clear(); }

void count_read(const void* address, size_t bytes) {
  check_alignment(address, bytes);
  Region* region = regions.empty() ? nullptr : region_of(address);
  if (region == nullptr) return;
  region->read += bytes;
  const size_t first = reinterpret_cast<uintptr_t>(address) - region->first;
  for (size_t i = first; i < first + bytes; ++i)
    region->is_read[i].store(true, std::memory_order_relaxed);
}

void count_write(const void* address, size_t bytes) {
  check_alignment(address, bytes);
  Region* region = regions.empty() ? nullptr : region_of(address);
  if (region != nullptr) region->written += bytes;
}

}  // namespace cuda_on_cpu
