// Passes by thread, and their end with it; see passes.h.
#include "nn/passes.h"

#include <set>

namespace reslora::detail {
namespace {

/// The chains inside of which this thread may be.
class ThreadEnd {
 public:
  ~ThreadEnd() {
    for (const auto& weak : chains_)
      if (const auto open = weak.lock()) open->end(std::this_thread::get_id());
  }

  void remember(const std::weak_ptr<Passes::Open>& open) {
    if (!chains_.insert(open).second) return;
    for (auto at = chains_.begin(); at != chains_.end();)  // models that are gone
      at = at->expired() ? chains_.erase(at) : std::next(at);
  }

 private:
  std::set<std::weak_ptr<Passes::Open>, std::owner_less<>> chains_;
};

thread_local ThreadEnd thread_end;

}  // namespace

void Passes::Open::end(std::thread::id thread) {
  Pass ended;  // its graph is freed after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = by_thread.find(thread);
  if (found == by_thread.end()) return;
  ended = std::move(found->second);
  by_thread.erase(found);
}

Pass& Passes::own() {
  thread_end.remember(open_);
  const std::lock_guard<std::mutex> lock(open_->mutex);
  return open_->by_thread[std::this_thread::get_id()];  // references outlive a rehash
}

void Passes::end_own() { open_->end(std::this_thread::get_id()); }

}  // namespace reslora::detail
