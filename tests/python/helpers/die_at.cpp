// Preloaded into a program: dies, stops or fails at its n-th change of a folder.
//
// Counted are the calls that change what is on the disk below the folder, or make it last, once
// `die_at` has said which one is meant; or the variable RESLORA_DIE_AT, "<call> <kind> <folder>",
// for a program that knows nothing of it. Such a program ends with 4 where it has lived on after
// that.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

char folder[4096] = "";
int left = -1;  // calls until the one that is meant; negative: none is
int how = 0;    // 0: die, 1: stop, otherwise the errno that the call fails with

bool is_below(const char* path) { return folder[0] && path && std::strstr(path, folder); }

bool is_below(int descriptor) {
  char path[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t size = ::readlink(link.c_str(), path, sizeof path - 1);
  if (size < 0) return false;
  path[size] = '\0';
  return is_below(path);
}

/// True where the call must fail; dies or stops here.
template <typename Place>
bool must_fail(Place place) {
  if (left < 0 || !is_below(place) || left-- > 0) return false;
  if (how == 0) ::_exit(99);
  if (how == 1) {
    ::raise(SIGSTOP);
    return false;
  }
  errno = how;
  return true;
}

template <typename Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

void die_at(const char* below, int call, int kind) {
  std::snprintf(folder, sizeof folder, "%s", below);
  left = call, how = kind;
}
int calls_left() { return left; }

__attribute__((constructor)) void begin() {
  const char* given = std::getenv("RESLORA_DIE_AT");
  if (given) std::sscanf(given, "%d %d %4095s", &left, &how, folder);
}
__attribute__((destructor)) void end() {
  if (std::getenv("RESLORA_DIE_AT") && left < 0) ::_exit(4);
}

int rename(const char* from, const char* to) {
  static const auto next = real<int (*)(const char*, const char*)>("rename");
  return must_fail(to) ? -1 : next(from, to);
}
int unlink(const char* path) {
  static const auto next = real<int (*)(const char*)>("unlink");
  return must_fail(path) ? -1 : next(path);
}
int remove(const char* path) {
  static const auto next = real<int (*)(const char*)>("remove");
  return must_fail(path) ? -1 : next(path);
}
int rmdir(const char* path) {
  static const auto next = real<int (*)(const char*)>("rmdir");
  return must_fail(path) ? -1 : next(path);
}
int mkdir(const char* path, mode_t mode) {
  static const auto next = real<int (*)(const char*, mode_t)>("mkdir");
  return must_fail(path) ? -1 : next(path, mode);
}
char* mkdtemp(char* path) {
  static const auto next = real<char* (*)(char*)>("mkdtemp");
  return must_fail(path) ? nullptr : next(path);
}
int chmod(const char* path, mode_t mode) {
  static const auto next = real<int (*)(const char*, mode_t)>("chmod");
  return must_fail(path) ? -1 : next(path, mode);
}
int fchmod(int descriptor, mode_t mode) {
  static const auto next = real<int (*)(int, mode_t)>("fchmod");
  return must_fail(descriptor) ? -1 : next(descriptor, mode);
}
int fsync(int descriptor) {
  static const auto next = real<int (*)(int)>("fsync");
  return must_fail(descriptor) ? -1 : next(descriptor);
}
ssize_t write(int descriptor, const void* data, size_t size) {
  static const auto next = real<ssize_t (*)(int, const void*, size_t)>("write");
  return must_fail(descriptor) ? -1 : next(descriptor, data, size);
}
ssize_t pwrite(int descriptor, const void* data, size_t size, off_t offset) {
  static const auto next = real<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite");
  return must_fail(descriptor) ? -1 : next(descriptor, data, size, offset);
}
ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t offset) {
  static const auto next = real<ssize_t (*)(int, const void*, size_t, off64_t)>("pwrite64");
  return must_fail(descriptor) ? -1 : next(descriptor, data, size, offset);
}

// Only where it makes a file.
#define RESLORA_OPEN(name)                                                    \
  int name(const char* path, int flags, ...) {                                \
    static const auto next = real<int (*)(const char*, int, ...)>(#name);     \
    va_list rest;                                                             \
    va_start(rest, flags);                                                    \
    const mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;           \
    va_end(rest);                                                             \
    return flags & O_CREAT && must_fail(path) ? -1 : next(path, flags, mode); \
  }
RESLORA_OPEN(open)
RESLORA_OPEN(open64)
}
