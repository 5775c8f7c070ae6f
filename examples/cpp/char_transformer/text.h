// A text file as characters, and batches of it.
#pragma once

#include <torch/torch.h>

#include <fstream>
#include <iterator>
#include <string>
#include <utility>

struct Text {
  torch::Tensor train, held_out;  // int64, the last tenth held out

  /// Reads a file of at least 20 windows; characters beyond ASCII become '?'.
  Text(const std::string& path, int64_t window) {
    std::ifstream file(path, std::ios::binary);
    TORCH_CHECK(file, "the text ", path,
                " cannot be read; name one of your own with --text and "
                "--other (any plain text), or the folder of data sets with --data");
    std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    for (char& c : bytes)
      if (static_cast<unsigned char>(c) > 127) c = '?';
    const auto size = static_cast<int64_t>(bytes.size());
    TORCH_CHECK_VALUE(size >= 200 * window, "a text must hold ", 200 * window,
                      " characters at least; got ", size, " in ", path);
    const auto all = torch::from_blob(bytes.data(), {size}, torch::kUInt8).to(torch::kLong);
    train = all.narrow(0, 0, size - size / 10);
    held_out = all.narrow(0, size - size / 10, size / 10);
  }

  /// `count` windows at random places; draws from the default generator.
  static torch::Tensor sample(const torch::Tensor& characters, int64_t count, int64_t window) {
    const auto first = torch::randint(characters.size(0) - window, {count, 1}, torch::kLong);
    return characters.index({first + torch::arange(window)});
  }

  /// The first windows one after the other: the same ones every time.
  static torch::Tensor in_order(const torch::Tensor& characters, int64_t count, int64_t window) {
    count = std::min(count, characters.size(0) / window);
    return characters.narrow(0, 0, count * window).view({count, window});
  }
};
