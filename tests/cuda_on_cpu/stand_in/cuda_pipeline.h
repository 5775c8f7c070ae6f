// Stands in for the toolkit's cuda_pipeline.h: an asynchronous copy happens when it is waited for,
// not before, so that a missing wait leaves NaN in shared memory.
#pragma once

#include "../emulator.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  cuda_on_cpu::copy_later(to, from, bytes, zeros);
}
inline void __pipeline_commit() { cuda_on_cpu::close_group(); }
inline void __pipeline_wait_prior(size_t groups) { cuda_on_cpu::copy_all_but(groups); }
