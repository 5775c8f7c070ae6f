/// @file
/// Files: safetensors only, by a strict reader and an atomic writer.
///
/// @code{.cpp}
/// reslora::TensorFile file = reslora::load_tensors("model.safetensors");  // any safetensors file
/// reslora::AdapterFile adapter = reslora::load_adapter("adapter/adapter_model.safetensors");
/// reslora::save_adapter("copy.safetensors", adapter);
/// @endcode
///
/// A reader never trusts a length: sizes are checked with overflow-safe arithmetic against the file
/// before anything is allocated; holes, overlaps, duplicate keys and trailing bytes are refused. A
/// writer makes a temporary file in the same folder, syncs, renames and syncs the folder, so that a
/// crash leaves the old file or the new one. Every error is one sentence with the operation and the
/// path: c10::ValueError where the content breaks a rule, plain c10::Error where the system refuses
/// (no such file, no permission, disk full).
/// Element types: F64 F32 F16 BF16 F8_E4M3 F8_E5M2 I64 I32 I16 I8 U8 BOOL.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain.h>
#include <reslora/export.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace reslora {

/// Named tensors and the string-to-string metadata of a safetensors file.
struct TensorFile {
  std::map<std::string, at::Tensor> tensors;    ///< by name
  std::map<std::string, std::string> metadata;  ///< free text by key
};

/// Reads a whole safetensors file into CPU tensors, each with memory of its own. Throws for
/// anything malformed; nothing is returned half-read. Cost: one read of the file, no second copy.
RESLORA_API TensorFile load_tensors(const std::string& path);

/// Writes `file` atomically with mode 0666 & ~umask, or that of the file it replaces. Tensors are
/// made contiguous on the CPU one at a time. Refuses tensors that are empty (a sharding accident),
/// not dense or of another element type, and text that is not UTF-8.
RESLORA_API void save_tensors(const std::string& path, const TensorFile& file);

/// An unmerged ResLoRA adapter. Keys of `tensors`: `<module>.reslora_A.weight`,
/// `<module>.reslora_B.weight`, and any others (modules_to_save) under their own names. In the file
/// all begin with "base_model.model.", where PEFT has the model; load_adapter takes that off again,
/// and reads files without it. It also takes out the parts of wrappers, which names of older files
/// may have (`plain_name`).
struct AdapterFile {
  std::string config_json;  ///< a JSON object: the Python dataclass, or what C++ made of its config
  std::vector<ChainRecord> chains;            ///< in the order of the model
  std::map<std::string, at::Tensor> tensors;  ///< by key
  std::string former_sum = {};  ///< tensors_sum of A and B by their names in the file, if others
  std::string sum = {};         ///< reslora.sha256 of the file that was read
};

/// The newest format that load_adapter reads. save_adapter writes it where a layer leaves links
/// out, which older versions would read, and format 1 otherwise.
constexpr int64_t kAdapterFormat = 2;

/// Writes an adapter. Metadata: format = "pt", reslora.format, reslora.version, reslora.config,
/// reslora.chains = [{"name", "layers": [{"name", "in", "out", "r", "scaling"}]}] (a layer that
/// leaves links out also has "left_out", an array of positions) and reslora.sha256. The sum covers
/// all that has a meaning: config, chains, then for each tensor by name its name, dtype, shape
/// ("3,4") and bytes; each text stands as "<length>:<text>". Refuses tensors that do not fit the
/// chains. Returns the sum.
RESLORA_API std::string save_adapter(const std::string& path, const AdapterFile& adapter);

/// Reads and checks an adapter: format known, checksum right, exactly the A [r, in] and B [out, r]
/// that the chains name. Throws c10::ValueError for a file that is not an adapter of ours; warns
/// where every B is zero, since such an adapter changes nothing.
RESLORA_API AdapterFile load_adapter(const std::string& path);

/// Returns the sum of a file that `save_adapter` wrote, by its header alone; empty for another
/// file.
RESLORA_API std::string sum_in_header(const std::string& path);

/// The SHA-256 of tensors by name: name, dtype, shape and bytes, as in save_adapter. Tells whether
/// statistics belong to an adapter.
RESLORA_API std::string tensors_sum(const std::map<std::string, at::Tensor>& tensors);

}  // namespace reslora
