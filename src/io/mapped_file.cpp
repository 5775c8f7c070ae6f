// Mapping a file, and what happens where its pages go away; see mapped_file.h.
#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>
#include <system_error>

namespace reslora::detail {
namespace {

/// Addresses of a map. `begin` is 0 where the slot is free, 1 while it is taken or given back.
struct Range {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> is_cut{false};  // pages of it were filled with zeros
};

constexpr int kMostDescriptors = 256;  // a process may have a thousand files open
std::atomic<int> descriptors{0};       // that maps keep open
std::array<Range, 1024> ranges;        // more than models have files
struct sigaction previous;
const long page_size = ::sysconf(_SC_PAGESIZE);

// In a signal's si_errno, which Linux leaves 0: the handler before has got it and passed it back.
constexpr int kPassedOn = 0x7e51;

/// Lets the handler that was there before have a signal that is of no map; its default, where it
/// has had this one already.
void pass_on(int signal, siginfo_t* info, void* context) {
  static std::atomic<void*> left{nullptr};  // an access that the handler before did not mend
  const bool is_sent = info->si_code <= 0;  // by kill or raise
  const bool is_had = info->si_errno == kPassedOn || (!is_sent && left == info->si_addr);
  const bool is_function = (previous.sa_flags & SA_SIGINFO) != 0 ||
                           (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
  if (is_function && !is_had) {
    info->si_errno = kPassedOn;
    if ((previous.sa_flags & SA_NODEFER) != 0) {
      sigset_t own;
      ::sigemptyset(&own);
      ::sigaddset(&own, signal);
      ::pthread_sigmask(SIG_UNBLOCK, &own, nullptr);
    }
    if ((previous.sa_flags & SA_SIGINFO) != 0) {
      previous.sa_sigaction(signal, info, context);
    } else {
      previous.sa_handler(signal);
    }
    if (!is_sent) left = info->si_addr;
    return;
  }
  if (is_sent && !is_had && previous.sa_handler == SIG_IGN) return;
  struct sigaction to_default = {};
  to_default.sa_handler = SIG_DFL;
  ::sigaction(SIGBUS, &to_default, nullptr);
  if (is_sent) ::raise(signal);  // what is not sent is tried again
}

/// Calls nothing but system calls, as a handler must, and the handler before.
void fill_with_zeros(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    const uintptr_t begin = range.begin.load(), end = range.end.load();
    if (info->si_code <= 0 || begin < 2 || at < begin || at >= end) continue;
    const uintptr_t page = at - at % static_cast<uintptr_t>(page_size);
    void* gone = reinterpret_cast<void*>(page);
    const int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS;
    range.is_cut = true;
    if (::mmap(gone, end - page, PROT_READ, flags, -1, 0) == MAP_FAILED) break;
    errno = error;
    return;
  }
  pass_on(signal, info, context);
  errno = error;
}

/// Handles SIGBUS, also where somebody else has begun to since the map before.
void install() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  struct sigaction own = {}, now;
  own.sa_sigaction = fill_with_zeros;
  own.sa_flags = SA_SIGINFO | SA_ONSTACK;
  ::sigemptyset(&own.sa_mask);
  if (::sigaction(SIGBUS, nullptr, &now) != 0 || now.sa_sigaction == fill_with_zeros) return;
  previous = now;
  ::sigaction(SIGBUS, &own, nullptr);
}

constexpr const char* kWrittenTo =
    "the file must stay as it is while it is read; it was written to";

int taken_slot(const unsigned char* base, uint64_t size) {
  for (size_t i = 0; i < ranges.size(); ++i) {
    uintptr_t free = 0;
    if (!ranges[i].begin.compare_exchange_strong(free, 1)) continue;
    const auto begin = reinterpret_cast<uintptr_t>(base);
    ranges[i].end = begin + size;
    ranges[i].is_cut = false;
    ranges[i].begin = begin;
    return static_cast<int>(i);
  }
  return -1;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  InputFile file(path);  // checks that it is a regular file
  header_ = read_header(file);
  size_ = file.size();
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  void* at = MAP_FAILED;
  if (descriptor_ >= 0 && ::fstat(descriptor_, &found_) == 0)
    at = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
  const int error = errno;
  if (at == MAP_FAILED) {
    if (descriptor_ >= 0) ::close(descriptor_);
    throw FileError("the file cannot be mapped: " + std::generic_category().message(error));
  }
  base_ = static_cast<unsigned char*>(at);
  if (descriptors.fetch_add(1) >= kMostDescriptors) {
    --descriptors;
    ::close(descriptor_);
    descriptor_ = -1;
  }
  ::madvise(base_, size_, MADV_SEQUENTIAL);
  install();
  slot_ = taken_slot(base_, size_);
}

MappedFile::~MappedFile() {
  if (slot_ >= 0) ranges[slot_].begin = 1;
  ::munmap(base_, size_);
  if (slot_ >= 0) ranges[slot_].begin = 0;
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  --descriptors;
}

const unsigned char* MappedFile::data() const {
  const uint64_t length = header_.tensors.empty() ? 0 : header_.tensors.back().end;
  return base_ + (size_ - length);
}

void MappedFile::check_unchanged() const {
  struct stat now;
  if (slot_ >= 0 && ranges[slot_].is_cut) throw FileError(kWrittenTo);
  if ((descriptor_ >= 0 ? ::fstat(descriptor_, &now) : ::stat(path_.c_str(), &now)) != 0) return;
  if (now.st_dev != found_.st_dev || now.st_ino != found_.st_ino) return;
  const bool is_same = static_cast<uint64_t>(now.st_size) == size_ &&
                       now.st_mtim.tv_sec == found_.st_mtim.tv_sec &&
                       now.st_mtim.tv_nsec == found_.st_mtim.tv_nsec;
  if (!is_same) throw FileError(kWrittenTo);
}

}  // namespace reslora::detail
