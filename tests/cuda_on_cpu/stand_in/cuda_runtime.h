// Stands in for the toolkit's cuda_runtime.h where a kernel file is compiled for the CPU: the
// qualifiers vanish, and the built-ins are those of emulator.h.
#pragma once

#include "../emulator.h"

#undef __host__
#undef __device__
#undef __global__
#undef __launch_bounds__
#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
// Where a block's shared memory and the counted accesses of device.cuh are.
#define RESLORA_SHARED(name) unsigned char* name = cuda_on_cpu::shared_memory()
#define RESLORA_READS(address, bytes) cuda_on_cpu::count_read(address, bytes)
#define RESLORA_WRITES(address, bytes) cuda_on_cpu::count_write(address, bytes)

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline void __syncwarp() { cuda_on_cpu::warp_barrier(); }
inline float __shfl_down_sync(unsigned, float value, unsigned distance) {
  return cuda_on_cpu::shuffle_down(value, distance);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::options().device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = cuda_on_cpu::options().shared_bytes;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return cuda_on_cpu::allow_shared_memory(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  return cuda_on_cpu::run(*config, reinterpret_cast<const void*>(kernel),
                          [&](uint3 thread, uint3 block) {
                            threadIdx = thread;
                            blockIdx = block;
                            blockDim = config->blockDim;
                            gridDim = config->gridDim;
                            kernel(Parameters(args)...);
                          });
}
