// What the example programs share: options, a progress bar, and errors in one sentence.
#pragma once

#include <c10/util/Exception.h>
#include <fmt/core.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

/// Options as `--name value`; every name must be among the defaults. `--help` lists them and ends.
class Options {
 public:
  Options(int count, char** arguments, std::map<std::string, std::string> defaults)
      : values_(std::move(defaults)) {
    for (int k = 1; k < count; ++k) {
      const std::string name = arguments[k];
      if (name == "--help") {
        fmt::print("options:{}\n", usage());
        std::exit(0);
      }
      const auto known = values_.find(name.rfind("--", 0) == 0 ? name.substr(2) : "");
      TORCH_CHECK_VALUE(known != values_.end() && ++k < count,
                        "options are name and value:", usage(), "; got ", name);
      known->second = arguments[k];
    }
  }

  const std::string& text(const std::string& name) const { return values_.at(name); }
  int64_t number(const std::string& name, int64_t least = 0) const {
    size_t end = 0;
    int64_t value = -1;
    try {
      value = std::stoll(text(name), &end);
    } catch (const std::exception&) {
    }
    TORCH_CHECK_VALUE(end == text(name).size() && value >= least, "--", name,
                      " must be a whole number of at least ", least, "; got ", text(name));
    return value;
  }

 private:
  std::string usage() const {
    std::string names;
    for (const auto& item : values_) names += fmt::format(" [--{} {}]", item.first, item.second);
    return names;
  }

  std::map<std::string, std::string> values_;
};

/// A bar on the terminal; nothing where standard error is none.
class Progress {
 public:
  Progress(std::string name, int64_t total) : name_(std::move(name)), total_(total) {}
  void show(int64_t done, double loss) const {
    if (isatty(STDERR_FILENO) == 0 || total_ == 0) return;
    const auto width = static_cast<size_t>(30 * done / total_);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
    const double left =
        spent.count() * static_cast<double>(total_ - done) / static_cast<double>(done);
    fmt::print(stderr, "\r{:<14} [{:<30}] {}/{}  loss {:.4f}  {:.0f} s left ", name_,
               std::string(width, '='), done, total_, loss, left);
    if (done == total_) fmt::print(stderr, "\r{:<90}\r", "");
    std::fflush(stderr);
  }

 private:
  std::string name_;
  int64_t total_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Runs a program's body; an error becomes one sentence and exit code 1.
template <typename Body>
int run_program(const char* name, const Body& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    fmt::print(stderr, "{}: {}\n", name, error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}: {}\n", name, error.what());
  }
  return 1;
}
