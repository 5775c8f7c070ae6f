// Runs CUDA kernels on the CPU: blocks one after the other, each CUDA thread a thread of its own.
//
// So ThreadSanitizer sees a missing barrier and AddressSanitizer an access outside of a buffer. A
// block's shared memory is allocated to the byte and starts as NaN. A thread that meets a barrier
// which others do not meet ends the program with a sentence. Global accesses that the kernels
// announce are checked for alignment and, inside of watched buffers, counted.
#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_on_cpu {

/// What tests may set; the defaults are those of a plain run.
struct Options {
  bool is_order_reversed = false;     // the last block runs first
  cudaError_t failure = cudaSuccess;  // what each launch returns, without running, if an error
  int device = 0;                     // the current one
  int shared_bytes = 227 * 1024;      // what a block may have at most: that of an H100
};
Options& options();

/// Ends the program with a sentence unless `holds`.
void require(bool holds, const char* sentence);

// ---- Launches and what a kernel calls

/// Lets a kernel have shared memory on the current device.
cudaError_t allow_shared_memory(const void* kernel, int bytes);
/// How often that was asked for since the program began.
int times_allowed();
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void(uint3 thread, uint3 block)>& body);
int64_t launches();  // how many were run so far
unsigned char* shared_memory();
int lane();
void block_barrier();
void warp_barrier();
float shuffle_down(float value, unsigned distance);
/// Copies all but the last `zeros` bytes, and writes zeros there.
void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void close_group();
void copy_all_but(size_t groups);

// ---- Traffic

/// Bytes of one watched buffer. `*_once` counts each byte once: what a cache that forgets nothing
/// would still take from memory.
struct Traffic {
  uint64_t read = 0;
  uint64_t read_once = 0;
  uint64_t written = 0;
};

void watch(const std::string& name, const void* data, size_t bytes);
Traffic traffic_of(const std::string& name);
void stop_watching();
void count_read(const void* address, size_t bytes);
void count_write(const void* address, size_t bytes);

}  // namespace cuda_on_cpu
