// Merging on disk: what a mapped file shows, and what an edited copy of it holds.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <reslora/adapter_io.h>
#include <reslora/model_files.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "io/in_folder.h"
#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::all_close;
using ::testing::ElementsAre;
using testing::random;
using testing::refuses;
using ::testing::UnorderedElementsAre;

constexpr int64_t kBuffer = int64_t{16} << 20;  // no buffer of a write is larger

class ModelFilesTest : public testing::InFolder {
 protected:
  std::string put(const std::string& name, const TensorFile& file) const {
    save_tensors(path(name), file);
    return path(name);
  }
  std::string put_bytes(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }
  std::string bytes_of(const std::string& name) const {
    std::ifstream in(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  std::vector<std::string> files() const {
    std::vector<std::string> found;
    for (const auto& item : std::filesystem::directory_iterator(folder_))
      found.push_back(item.path().filename());
    return found;
  }
  /// One tensor of the file that `base` writes as "out" with one edit.
  Tensor written(const ModelFiles& base, const std::string& name, const TensorEdit& edit,
                 const WriteOptions& options = {}) const {
    base.write(path("out"), {name}, {{name, edit}}, options);
    return load_tensors(path("out")).tensors.at(name);
  }
  /// True where a write is refused with `part` and leaves only the file "in".
  ::testing::AssertionResult refuses_write(const std::vector<std::string>& names,
                                           const std::map<std::string, TensorEdit>& edits,
                                           const std::string& part,
                                           const WriteOptions& options = {}) const {
    const ModelFiles base({path("in")});
    const auto result = refuses([&] { base.write(path("out"), names, edits, options); }, part);
    if (!result) return result;
    if (files() == std::vector<std::string>{"in"}) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "something was left behind";
  }
};

bool is_same(const Tensor& got, const Tensor& wanted) {
  return got.scalar_type() == wanted.scalar_type() && got.sizes() == wanted.sizes() &&
         std::memcmp(got.const_data_ptr(), wanted.contiguous().const_data_ptr(), wanted.nbytes()) ==
             0;
}

LayerMerge layer_of(int64_t out, int64_t in, at::ScalarType dtype = at::kFloat, int64_t r = 3) {
  return {"layers.1.q",
          MergeRule::kExact,
          {},
          random({r, in}, 91).to(dtype),
          random({out, r}, 92).to(dtype)};
}

TensorEdit edit_of(const LayerMerge& layer, bool is_transposed = false, bool is_bias = false) {
  TensorEdit edit;
  edit.layer = layer;
  edit.is_transposed = is_transposed;
  edit.is_bias = is_bias;
  return edit;
}

TensorEdit replaced_by(const Tensor& tensor) {
  TensorEdit edit;
  edit.replacement = tensor;
  return edit;
}

TensorFile mixed_file() {
  TensorFile file{{}, {{"format", "pt"}, {"note", "a b"}}};
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                           at::kChar, at::kBool, at::kFloat8_e4m3fn}) {
    const std::string name = c10::toString(dtype);
    file.tensors[name] = at::arange(15, at::kFloat).reshape({3, 5}).to(dtype);
    file.tensors[name + ".scalar"] = at::ones({}, at::kFloat).to(dtype);
  }
  return file;
}

// ---- reading

TEST_F(ModelFilesTest, ShowNamesPathsMetadataAndViews) {
  const std::string first =
      put("1", {{{"b", random({2, 3}, 1)}, {"a", at::ones({2})}}, {{"k", "v"}}});
  const std::string second = put("2", {{{"0", at::ones({1}, at::kBool)}}, {}});
  Tensor view;
  {
    const ModelFiles files({first, second});
    EXPECT_THAT(files.names(), ElementsAre("b", "a", "0"));  // the order of their data
    EXPECT_EQ(files.path_of("a"), first);
    EXPECT_EQ(files.path_of("0"), second);
    EXPECT_EQ(files.metadata_of(first), (std::map<std::string, std::string>{{"k", "v"}}));
    EXPECT_TRUE(files.metadata_of(second).empty());
    view = files.tensor("b");
    EXPECT_EQ(view.const_data_ptr(), files.tensor("b").const_data_ptr());  // nothing is copied
    EXPECT_TRUE(refuses([&] { files.path_of("c"); }, "got 'c'"));
    EXPECT_TRUE(refuses([&] { files.tensor("c"); }, "got 'c'"));
    EXPECT_TRUE(refuses([&] { files.metadata_of("elsewhere"); }, "elsewhere"));
  }
  std::filesystem::remove(first);
  EXPECT_TRUE(is_same(view, random({2, 3}, 1)));  // the view keeps the map
}

TEST_F(ModelFilesTest, ReadEveryDtypeToTheBit) {
  const TensorFile file = mixed_file();
  const ModelFiles files({put("in", file)});
  EXPECT_EQ(files.names().size(), file.tensors.size());
  for (const auto& [name, tensor] : file.tensors)
    EXPECT_TRUE(is_same(files.tensor(name), tensor)) << name;
}

TEST_F(ModelFilesTest, DataThatIsNotAlignedIsReadAndMerged) {
  const Tensor W = random({40, 6}, 1).to(at::kFloat);
  const std::string json =
      R"({"w":{"dtype":"F32","shape":[40,6],"data_offsets":[0,960]}})";  // and an odd length
  std::string bytes(8, '\0');
  bytes[0] = static_cast<char>(json.size());
  bytes += json + std::string(static_cast<const char*>(W.const_data_ptr()), 960);
  ASSERT_NE((8 + json.size()) % 4, 0U);
  const ModelFiles files({put_bytes("in", bytes)});
  EXPECT_TRUE(is_same(files.tensor("w"), W));
  const LayerMerge layer = layer_of(40, 6);
  EXPECT_TRUE(all_close(written(files, "w", edit_of(layer)), merged_weight(W, layer), 1e-6));
}

TEST_F(ModelFilesTest, RefuseMalformedFilesByTheirPath) {
  const std::string good = put("1", {{{"w", at::ones({4})}}, {}});
  EXPECT_TRUE(refuses(
      [&] {
        ModelFiles({good, put("2", {{{"w", at::ones({2})}}, {}})});
      },
      "tensor 'w' must be in one file"));
  EXPECT_TRUE(refuses([&] { ModelFiles({good, good}); }, good));
  const std::string bytes = bytes_of("1");
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::string cut = put_bytes("cut", bytes.substr(0, size));
    ASSERT_TRUE(refuses([&] { ModelFiles files({cut}); }, cut)) << size;
  }
  EXPECT_TRUE(refuses([&] { ModelFiles files({put_bytes("long", bytes + "x")}); }, "/long"));
  try {
    ModelFiles files({path("absent")});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const c10::ValueError&) {
    ADD_FAILURE() << "an absent file breaks no rule of content";
  } catch (const c10::Error& error) {
    EXPECT_THAT(error.what_without_backtrace(), ::testing::HasSubstr(path("absent")));
  }
}

// ---- writing

TEST_F(ModelFilesTest, AWriteWithoutEditsCopiesTheBytes) {
  const TensorFile file = mixed_file();
  const ModelFiles base({put("in", file)});
  WriteOptions options;
  options.metadata = file.metadata;
  base.write(path("out"), base.names(), {}, options);
  EXPECT_EQ(bytes_of("out"), bytes_of("in"));
  base.write(path("out"), {"Float"}, {}, {});  // some tensors, no metadata, over an older file
  const TensorFile some = load_tensors(path("out"));
  EXPECT_EQ(some.tensors.size(), 1U);
  EXPECT_TRUE(some.metadata.empty());
  EXPECT_TRUE(is_same(some.tensors.at("Float"), file.tensors.at("Float")));
}

class ModelFilesDtype : public ModelFilesTest,
                        public ::testing::WithParamInterface<at::ScalarType> {
 protected:
  /// Half a unit in the last place, and fp32 arithmetic before it.
  ::testing::AssertionResult is_rounded_once(const Tensor& got, const Tensor& exact) const {
    const auto dtype = GetParam();
    const double step = dtype == at::kBFloat16 ? 0x1p-8 : dtype == at::kHalf ? 0x1p-11 : 0x1p-24;
    if (got.scalar_type() != dtype) return ::testing::AssertionFailure() << "another dtype";
    if (dtype == at::kDouble) return all_close(got, exact, 1e-14);
    const Tensor distance = (got.to(at::kDouble) - exact).abs();
    if ((distance <= step * exact.abs() + 2e-6).all().item<bool>())
      return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "distance " << distance.max().item<double>();
  }
  Tensor stored(at::IntArrayRef sizes) const { return random(sizes, 7).to(GetParam()); }
};

TEST_P(ModelFilesDtype, AnEditIsTheMergedWeightCastOnce) {
  const Tensor W = stored({11, 6});
  const ModelFiles base({put("in", {{{"w", W}}, {}})});
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const LayerMerge layer = layer_of(11, 6, dtype);
    const Tensor exact =
        W.to(at::kDouble) + at::mm(layer.B.to(at::kDouble), layer.A.to(at::kDouble));
    const Tensor got = written(base, "w", edit_of(layer));
    EXPECT_TRUE(is_rounded_once(got, exact)) << "factors " << c10::toString(dtype);
    EXPECT_TRUE(is_rounded_once(merged_weight(W, layer).to(GetParam()), exact));
  }
}

TEST_P(ModelFilesDtype, ATransposedWeightTakesTheTransposedProduct) {
  const Tensor Wt = stored({6, 11});  // [in, out]
  const ModelFiles base({put("in", {{{"w", Wt}}, {}})});
  const LayerMerge layer = layer_of(11, 6, at::kDouble);
  const Tensor exact = Wt.to(at::kDouble) + at::mm(layer.B, layer.A).t();
  EXPECT_TRUE(is_rounded_once(written(base, "w", edit_of(layer, true)), exact));
}

TEST_P(ModelFilesDtype, ABiasTakesTheOffset) {
  const Tensor bias = stored({11});
  const ModelFiles base({put("in", {{{"b", bias}}, {}})});
  LayerMerge layer = layer_of(11, 6, at::kDouble);
  layer.bias = random({11}, 93);
  const Tensor got = written(base, "b", edit_of(layer, false, true));
  EXPECT_TRUE(is_rounded_once(got, bias.to(at::kDouble) + layer.bias));
}

INSTANTIATE_TEST_SUITE_P(ModelFiles, ModelFilesDtype,
                         ::testing::Values(at::kDouble, at::kFloat, at::kHalf, at::kBFloat16));

TEST_F(ModelFilesTest, OtherTensorsOfAnEditedFileStayAsTheyAre) {
  const TensorFile file = mixed_file();
  const ModelFiles base({put("in", file)});
  base.write(path("out"), base.names(), {{"Half", edit_of(layer_of(3, 5))}}, {});
  const TensorFile got = load_tensors(path("out"));
  ASSERT_EQ(got.tensors.size(), file.tensors.size());
  for (const auto& [name, tensor] : file.tensors)
    EXPECT_EQ(is_same(got.tensors.at(name), tensor), name != "Half") << name;
}

TEST_F(ModelFilesTest, ReplacementsTakeThePlaceOfTensorsOrAreAdded) {
  const ModelFiles base({put("in", {{{"w", at::ones({4, 3})}, {"x", at::ones({2})}}, {}})});
  const Tensor other = random({5, 3}, 1).t();  // of another shape and dtype, not in C order
  const Tensor added = at::arange(3);
  const LayerMerge layer = layer_of(3, 5, at::kDouble);
  TensorEdit both = replaced_by(other);
  both.layer = layer;
  base.write(path("out"), {"w", "x", "new", "both"},
             {{"w", replaced_by(other)}, {"new", replaced_by(added)}, {"both", both}}, {});
  const TensorFile got = load_tensors(path("out"));
  ASSERT_EQ(got.tensors.size(), 4U);
  EXPECT_TRUE(is_same(got.tensors.at("w"), other));
  EXPECT_TRUE(is_same(got.tensors.at("x"), at::ones({2})));
  EXPECT_TRUE(is_same(got.tensors.at("new"), added));
  EXPECT_TRUE(all_close(got.tensors.at("both"), other + at::mm(layer.B, layer.A)));
}

TEST_F(ModelFilesTest, ADtypeIsGivenToFloatingTensorsOnlyAndInOneCast) {
  const Tensor W = random({3, 5}, 1).to(at::kBFloat16);
  TensorFile file = mixed_file();
  file.tensors["w"] = W;
  const ModelFiles base({put("in", file)});
  for (const auto dtype : {at::kFloat, at::kHalf, at::kDouble}) {
    WriteOptions options;
    options.dtype = dtype;
    const LayerMerge layer = layer_of(3, 5);
    base.write(path("out"), base.names(), {{"w", edit_of(layer)}}, options);
    const TensorFile got = load_tensors(path("out"));
    for (const auto& [name, tensor] : file.tensors) {
      if (name == "w") continue;
      const bool is_floating = at::isFloatingType(tensor.scalar_type());
      EXPECT_TRUE(is_same(got.tensors.at(name), is_floating ? tensor.to(dtype) : tensor)) << name;
    }
    // Not through bf16: that would lose all below 2^-8.
    EXPECT_EQ(got.tensors.at("w").scalar_type(), dtype);
    EXPECT_TRUE(all_close(got.tensors.at("w"), merged_weight(W, layer),
                          dtype == at::kHalf ? 0x1p-11 : 1e-6));
  }
}

TEST_F(ModelFilesTest, TensorsLargerThanTheBufferAreRight) {
  const Tensor W = at::randn({3000, 2000}, at::kFloat);
  ASSERT_GT(static_cast<int64_t>(W.nbytes()), kBuffer);
  const ModelFiles base({put("in", {{{"w", W}, {"plain", W + 1}}, {}})});
  std::vector<int64_t> seen;
  WriteOptions options;
  options.progress = [&](int64_t bytes) { seen.push_back(bytes); };
  for (const bool is_transposed : {false, true}) {
    const LayerMerge layer = is_transposed ? layer_of(2000, 3000) : layer_of(3000, 2000);
    seen.clear();
    base.write(path("out"), base.names(), {{"w", edit_of(layer, is_transposed)}}, options);
    const ModelFiles got({path("out")});
    const Tensor product = at::mm(layer.B, layer.A);
    EXPECT_TRUE(all_close(got.tensor("w"), W + (is_transposed ? product.t() : product), 1e-5));
    EXPECT_TRUE(is_same(got.tensor("plain"), W + 1));
    EXPECT_GE(seen.size(), 4U);  // two buffers for each, at least
    EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
    EXPECT_EQ(seen.back(), 2 * static_cast<int64_t>(W.nbytes()));
  }
}

TEST_F(ModelFilesTest, ProgressGrowsToAllBytesOfTensors) {
  const ModelFiles base({put("in", {{{"w", at::ones({4, 3})}, {"n", at::arange(5)}}, {}})});
  std::vector<int64_t> seen;
  WriteOptions options;
  options.dtype = at::kHalf;
  options.progress = [&](int64_t bytes) { seen.push_back(bytes); };
  base.write(path("out"), base.names(), {{"w", edit_of(layer_of(4, 3))}}, options);
  ASSERT_FALSE(seen.empty());
  EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
  EXPECT_EQ(seen.back(), 40 + 24);
}

TEST_F(ModelFilesTest, AnExceptionFromProgressLeavesNoFile) {
  const ModelFiles base({put("in", {{{"w", at::ones({4, 3})}, {"n", at::arange(5)}}, {}})});
  WriteOptions options;
  options.progress = [](int64_t bytes) {
    if (bytes > 50) throw std::runtime_error("stop");
  };
  const auto write = [&] { base.write(path("out"), base.names(), {}, options); };
  EXPECT_THROW(write(), std::runtime_error);
  EXPECT_THAT(files(), ElementsAre("in"));
  put_bytes("out", "old");
  EXPECT_THROW(write(), std::runtime_error);
  EXPECT_EQ(bytes_of("out"), "old");
  EXPECT_THAT(files(), UnorderedElementsAre("in", "out"));
}

TEST_F(ModelFilesTest, AFileMayReplaceTheOneItIsMadeFrom) {
  const Tensor W = random({4, 3}, 1);
  const ModelFiles base({put("in", {{{"w", W}}, {}})});
  const LayerMerge layer = layer_of(4, 3, at::kDouble);
  base.write(path("in"), {"w"}, {{"w", edit_of(layer)}}, {});
  EXPECT_TRUE(is_same(base.tensor("w"), W));  // the map is of the old file
  EXPECT_TRUE(all_close(load_tensors(path("in")).tensors.at("w"), merged_weight(W, layer)));
}

// ---- refusals of writes

TEST_F(ModelFilesTest, RefuseNamesThatCannotBeWritten) {
  put("in", {{{"w", at::ones({4, 3})}}, {}});
  EXPECT_TRUE(refuses_write({"w", "absent"}, {}, "'absent'"));
  EXPECT_TRUE(refuses_write({"w", "w"}, {}, "w"));
  EXPECT_TRUE(refuses_write({"__metadata__"}, {{"__metadata__", replaced_by(at::ones({1}))}},
                            "__metadata__"));
  EXPECT_TRUE(refuses_write({"w"}, {{"w", replaced_by(at::ones({2}, at::kComplexFloat))}}, "'w'"));
  EXPECT_TRUE(refuses_write({"w"}, {{"w", replaced_by(Tensor())}}, "'w'"));
}

TEST_F(ModelFilesTest, RefuseEditsThatDoNotFit) {
  put("in", {{{"w", at::ones({4, 3})},
              {"q", at::ones({4, 3}, at::kChar)},
              {"f", at::ones({4, 3}).to(at::kFloat8_e4m3fn)},
              {"b", at::ones({4})}},
             {}});
  const LayerMerge layer = layer_of(4, 3);
  EXPECT_TRUE(refuses_write({"b", "w"}, {{"w", edit_of(layer_of(3, 4))}},
                            "tensor 'w' must be [3, 4] to take layer 'layers.1.q'; got [4, 3]"));
  EXPECT_TRUE(refuses_write({"w"}, {{"w", edit_of(layer, true)}}, "must be [3, 4]"));
  EXPECT_TRUE(refuses_write({"b"}, {{"b", edit_of(layer)}}, "got [4]"));
  EXPECT_TRUE(refuses_write({"w"}, {{"w", edit_of(layer, false, true)}}, "must be [4]"));
  EXPECT_TRUE(refuses_write({"b"}, {{"b", edit_of(layer, false, true)}}, "adds no bias"));
  EXPECT_TRUE(refuses_write({"b", "q"}, {{"q", edit_of(layer)}}, "got Char"));
  EXPECT_TRUE(refuses_write({"f"}, {{"f", edit_of(layer)}}, "got Float8_e4m3fn"));
}

TEST_F(ModelFilesTest, RefuseEditsThatWouldBeLost) {
  put("in", {{{"w", at::ones({4, 3})}, {"b", at::ones({4})}}, {}});
  LayerMerge layer = layer_of(4, 3);
  EXPECT_TRUE(refuses_write({"w"}, {{"W", edit_of(layer)}},
                            "must be of a tensor in the files, or bring one; got 'W'"));
  layer.bias = at::ones({4});
  EXPECT_TRUE(refuses_write({"w", "b"}, {{"w", edit_of(layer)}},
                            "got 'w' of layer 'layers.1.q' alone: plan without use_affine"));
  const ModelFiles base({path("in")});
  base.write(path("out"), {"w"}, {{"w", edit_of(layer)}, {"b", edit_of(layer, false, true)}}, {});
  EXPECT_TRUE(all_close(load_tensors(path("out")).tensors.at("w"),
                        at::ones({4, 3}) + at::mm(layer.B, layer.A), 1e-6))
      << "a bias may be written to another file";
}

TEST_F(ModelFilesTest, RefuseADtypeThatIsNotFloating) {
  put("in", {{{"w", at::full({4, 3}, 0.5)}}, {}});
  WriteOptions options;
  options.dtype = at::kInt;  // would make every weight 0
  EXPECT_TRUE(refuses_write({"w"}, {}, "dtype", options));
}

TEST_F(ModelFilesTest, RefuseWhatBecomesInfiniteInHalfPrecision) {
  put("in", {{{"w", at::full({4, 3}, 1e5)}}, {}});
  WriteOptions options;
  options.dtype = at::kHalf;
  EXPECT_TRUE(refuses_write({"w"}, {}, "tensor 'w' must be finite and fit into F16", options));
}

TEST_F(ModelFilesTest, AnOldFileSurvivesARefusedWrite) {
  const ModelFiles base({put("in", {{{"w", at::ones({4, 3})}}, {}})});
  put_bytes("out", "old");
  EXPECT_TRUE(refuses(
      [&] {
        base.write(path("out"), {"w"}, {{"w", edit_of(layer_of(3, 4))}}, {});
      },
      "/out"));
  EXPECT_EQ(bytes_of("out"), "old");
}

}  // namespace
}  // namespace reslora
