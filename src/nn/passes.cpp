// How passes begin, what a call reads in them, and how they end.
#include "nn/passes.h"

#include <algorithm>
#include <utility>

namespace reslora {

const Passes::Thread& Passes::this_thread() {
  struct Living {
    const Thread thread = std::make_shared<std::atomic<bool>>(true);
    ~Living() { thread->store(false, std::memory_order_release); }
  };
  thread_local const Living living;
  return living.thread;
}

/// Replaces the pass of this thread, and drops those of threads that are gone.
Pass& Passes::open(bool is_asked_for, std::vector<Pass>& dropped) {
  for (auto at = passes_.begin(); at != passes_.end();) {
    if (at->first != this_thread() && at->first->load(std::memory_order_acquire)) {
      ++at;
      continue;
    }
    dropped.push_back(std::move(at->second));
    at = passes_.erase(at);
  }
  Pass& pass = passes_[this_thread()];
  pass.calls.assign(size_, 0);
  pass.is_asked_for = is_asked_for;
  return pass;
}

void Passes::begin() {
  std::vector<Pass> dropped;
  const std::lock_guard<std::mutex> lock(mutex_);
  open(/*is_asked_for=*/true, dropped);
}

PassCall Passes::enter(int64_t position) {
  PassCall call{position};
  std::vector<Pass> dropped;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = passes_.find(this_thread());
    if (at != passes_.end()) call.pass = &at->second;
    // The first layer after a later one: another forward. Again and again, it may be chunks.
    if (position == 0 && (!call.pass || (!call.pass->is_asked_for && call.pass->furthest > 0)))
      call.pass = &open(/*is_asked_for=*/false, dropped);
  }
  if (call.pass) {
    Pass& pass = *call.pass;
    if (!pass.is_asked_for && position <= pass.furthest) pass.is_lost = true;
    if (pass.is_lost) pass.taps.clear();
    call.has_taps = !pass.is_lost;
    call.number = static_cast<size_t>(pass.calls[position]);
  }
  if (!call.has_taps) {
    call.outside.resize(size_);
  } else if (call.number >= call.pass->taps.size()) {
    call.pass->taps.resize(call.number + 1, std::vector<at::Tensor>(size_));
  }
  return call;
}

void Passes::leave(const PassCall& call) {
  if (!call.pass) return;
  Pass& pass = *call.pass;
  const int64_t count = ++pass.calls[call.position];
  pass.furthest = std::max(pass.furthest, call.position);
  const bool is_last = call.position + 1 == static_cast<int64_t>(size_);
  if (!is_last || count < *std::max_element(pass.calls.begin(), pass.calls.end())) return;
  const Pass ended = std::move(pass);
  const std::lock_guard<std::mutex> lock(mutex_);
  passes_.erase(passes_.find(this_thread()));
}

}  // namespace reslora
