// MNIST's IDX files, gzipped or not, as tensors.
#pragma once

#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

struct Digits {
  torch::Tensor images, labels;  // [N, 784] fp32 in [-1, 1], [N] int64

  /// The digits whose label lies in [first, last].
  Digits only(int64_t first, int64_t last) const {
    const auto rows = ((labels >= first) & (labels <= last)).nonzero().flatten();
    return {images.index_select(0, rows), labels.index_select(0, rows)};
  }

  Digits rows(int64_t begin, int64_t end) const {
    end = std::min(end, labels.size(0));
    return {images.slice(0, begin, end), labels.slice(0, begin, end)};
  }
};

/// The bytes of folder/name, or of folder/name.gz by way of gzip.
inline std::vector<uint8_t> read_idx(const std::string& folder, const std::string& name) {
  const std::string path = folder + "/" + name;
  const bool is_plain = std::filesystem::exists(path);
  TORCH_CHECK(is_plain || std::filesystem::exists(path + ".gz"), "MNIST's file ", name,
              " (or .gz) is not in ", folder, "; name the folder that holds it with --data");
  TORCH_CHECK_VALUE(path.find('\'') == std::string::npos,
                    "the folder's name must have no quote; got ", folder);
  const std::string command = is_plain ? "cat -- '" + path + "'" : "gzip -dc -- '" + path + ".gz'";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  TORCH_CHECK(pipe, "gzip could not be started");
  std::vector<uint8_t> bytes;
  uint8_t buffer[65536];
  for (size_t count = 0; (count = fread(buffer, 1, sizeof(buffer), pipe.get())) > 0;)
    bytes.insert(bytes.end(), buffer, buffer + count);
  return bytes;
}

/// Reads <part>-images-idx3-ubyte and <part>-labels-idx1-ubyte.
inline Digits read_digits(const std::string& folder, const std::string& part) {
  const std::vector<uint8_t> images = read_idx(folder, part + "-images-idx3-ubyte");
  const std::vector<uint8_t> labels = read_idx(folder, part + "-labels-idx1-ubyte");
  const auto count = static_cast<int64_t>(labels.size()) - 8;
  TORCH_CHECK_VALUE(count > 0 && static_cast<int64_t>(images.size()) == 16 + count * 784,
                    "MNIST's files must hold as many images of 28 x 28 as labels; got ",
                    images.size(), " and ", labels.size(), " bytes in ", folder);
  const auto pixels =
      torch::from_blob(const_cast<uint8_t*>(images.data()) + 16, {count, 784}, torch::kUInt8);
  const auto classes =
      torch::from_blob(const_cast<uint8_t*>(labels.data()) + 8, {count}, torch::kUInt8);
  return {pixels.to(torch::kFloat) / 127.5 - 1, classes.to(torch::kLong)};
}
