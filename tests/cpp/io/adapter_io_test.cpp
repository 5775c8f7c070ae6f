// Files with tensors: round trips, refusals, mutations, the adapter format.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <reslora/adapter_io.h>
#include <reslora/plain_lora.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "io/in_folder.h"
#include "testing.h"

namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class AdapterIo : public reslora::testing::InFolder {
 protected:
  void SetUp() override {
    InFolder::SetUp();
    path_ = folder_ + "/adapter.safetensors";
  }
  std::string content() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  void put(const std::string& bytes) const { std::ofstream(path_, std::ios::binary) << bytes; }

  std::string path_;
};

// The sentence of a c10::ValueError, of another c10::Error with "I/O: " before it, or "".
template <typename Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  } catch (const c10::Error& error) {
    return std::string("I/O: ") + error.what_without_backtrace();
  }
  return "";
}

void expect_same(const at::Tensor& got, const at::Tensor& wanted, const std::string& name) {
  ASSERT_EQ(got.scalar_type(), wanted.scalar_type()) << name;
  ASSERT_EQ(got.sizes(), wanted.sizes()) << name;
  ASSERT_EQ(std::memcmp(got.const_data_ptr(), wanted.const_data_ptr(), wanted.nbytes()), 0) << name;
}

reslora::TensorFile every_dtype() {
  reslora::TensorFile file;
  for (const auto dtype :
       {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
        at::kChar, at::kByte, at::kBool, at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
    const std::string name = c10::toString(dtype);
    file.tensors[name] = at::arange(6, at::kFloat).sub(1).reshape({2, 3}).abs().to(dtype);
    file.tensors[name + ".scalar"] = at::ones({}, at::kFloat).to(dtype);
    file.tensors[name + ".odd"] = at::ones({1, 3, 1}, at::kFloat).to(dtype);
  }
  file.metadata = {{"format", "pt"}, {"\xc3\xa9\n\"", "\\ \x01"}, {"", ""}};
  return file;
}

TEST_F(AdapterIo, EveryDtypeRoundTripsToTheBit) {
  const reslora::TensorFile file = every_dtype();
  reslora::save_tensors(path_, file);
  const reslora::TensorFile got = reslora::load_tensors(path_);
  EXPECT_EQ(got.metadata, file.metadata);
  ASSERT_EQ(got.tensors.size(), file.tensors.size());
  for (const auto& [name, tensor] : file.tensors) {
    ASSERT_EQ(got.tensors.count(name), 1U) << name;
    expect_same(got.tensors.at(name), tensor, name);
  }
}

TEST_F(AdapterIo, AFileWithoutTensorsRoundTrips) {
  reslora::save_tensors(path_, {{}, {{"a", "b"}}});
  const reslora::TensorFile got = reslora::load_tensors(path_);
  EXPECT_TRUE(got.tensors.empty());
  EXPECT_EQ(got.metadata.at("a"), "b");
}

TEST_F(AdapterIo, ViewsAreWrittenInCOrder) {
  const at::Tensor base = at::arange(24, at::kFloat).reshape({4, 6});
  const at::Tensor imaginary = at::imag(at::complex(base, base).conj());  // carries the neg bit
  ASSERT_TRUE(imaginary.is_neg());
  reslora::save_tensors(path_, {{{"t", base.t()},
                                 {"step", base.slice(1, 1, 6, 2)},
                                 {"expanded", base[0].expand({3, 6})},
                                 {"grad", base.clone().requires_grad_()},
                                 {"neg", imaginary}},
                                {}});
  const auto got = reslora::load_tensors(path_).tensors;
  expect_same(got.at("t"), base.t().contiguous(), "t");
  expect_same(got.at("step"), base.slice(1, 1, 6, 2).contiguous(), "step");
  expect_same(got.at("expanded"), base[0].expand({3, 6}).contiguous(), "expanded");
  expect_same(got.at("grad"), base, "grad");
  expect_same(got.at("neg"), -base, "neg");
  EXPECT_FALSE(got.at("grad").requires_grad());
}

TEST_F(AdapterIo, LoadedTensorsOwnTheirMemory) {
  reslora::save_tensors(path_, {{{"a", at::ones({3})}, {"b", at::ones({3})}}, {}});
  auto got = reslora::load_tensors(path_).tensors;
  got.at("a").fill_(7).resize_({100});
  expect_same(got.at("b"), at::ones({3}), "b");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(got.at("b").data_ptr()) % 64, 0U);
  reslora::save_tensors(path_, {got, {}});  // over the file that they came from
  expect_same(reslora::load_tensors(path_).tensors.at("b"), at::ones({3}), "b");
}

TEST_F(AdapterIo, RefusesToWriteWhatFilesCannotHold) {
  put("old");
  const auto save = [&](const at::Tensor& tensor, const std::string& name = "name") {
    return error_of([&] {
      reslora::save_tensors(path_, {{{"a", at::ones({2})}, {name, tensor}}, {}});
    });
  };
  EXPECT_THAT(save(at::empty({0, 4})), HasSubstr("tensor 'name' must not be empty; got [0, 4]"));
  EXPECT_THAT(save(at::Tensor()), HasSubstr("tensor 'name' must be defined"));
  EXPECT_THAT(save(at::ones({2}, at::kComplexFloat)), HasSubstr("has dtype ComplexFloat"));
  EXPECT_THAT(save(at::ones({2}).to_sparse()), HasSubstr("plain dense tensor"));
  EXPECT_THAT(save(at::empty({2}, at::TensorOptions(at::kMeta))), HasSubstr("on meta"));
  EXPECT_THAT(save(at::ones({1}), "__metadata__"), HasSubstr("must not be named"));
  EXPECT_THAT(save(at::ones({1}), "\xff"), HasSubstr("UTF-8"));
  EXPECT_THAT(save(at::ones(std::vector<int64_t>(17, 1))), HasSubstr("at most 16 dimensions"));
  EXPECT_THAT(save(at::empty({0})), Not(HasSubstr("I/O")));
  EXPECT_EQ(content(), "old");
  EXPECT_EQ(names().size(), 1U);
}

TEST_F(AdapterIo, ErrorsNameThePathAndTellTheSystemFromTheContent) {
  EXPECT_EQ(
      error_of([&] { reslora::load_tensors(path_); }),
      "I/O: [load_tensors] '" + path_ + "': the file cannot be opened: No such file or directory");
  EXPECT_THAT(error_of([&] { reslora::load_tensors(folder_); }),
              HasSubstr("must name a regular file"));
  EXPECT_THAT(error_of([&] { reslora::save_tensors(folder_ + "/none/f", {}); }),
              HasSubstr("I/O: [save_tensors]"));
  put("");
  EXPECT_EQ(error_of([&] { reslora::load_tensors(path_); }),
            "[load_tensors] '" + path_ + "': a safetensors file must have at least 8 bytes; got 0");
  put(std::string(8, '\x7f'));
  EXPECT_THAT(error_of([&] { reslora::load_tensors(path_); }), HasSubstr("no safetensors file"));
  if (::geteuid() == 0) return;  // root may read and write everything
  ASSERT_EQ(::chmod(path_.c_str(), 0), 0);
  EXPECT_THAT(error_of([&] { reslora::load_tensors(path_); }), HasSubstr("Permission denied"));
}

TEST_F(AdapterIo, ASaveThatRunsOutOfSpaceLeavesTheOldFile) {
  put("old");
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000, old.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = error_of([&] {
    reslora::save_tensors(path_, {{{"a", at::ones({1000})}}, {}});
  });
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(message, HasSubstr("I/O: [save_tensors]"));
  EXPECT_THAT(message, HasSubstr("File too large"));
  EXPECT_EQ(content(), "old");
  EXPECT_EQ(names().size(), 1U);
}

reslora::TensorFile small_file() {
  return {{{"w", at::arange(4, at::kFloat)}, {"b", at::ones({3}, at::kBool)}}, {{"k", "v"}}};
}

TEST_F(AdapterIo, RefusesAFileThatIsCutAtAnyByte) {
  reslora::save_tensors(path_, small_file());
  const std::string good = content();
  for (size_t size = 0; size < good.size(); ++size) {
    put(good.substr(0, size));
    const std::string message = error_of([&] { reslora::load_tensors(path_); });
    ASSERT_THAT(message, HasSubstr("[load_tensors]")) << size;
    ASSERT_THAT(message, Not(HasSubstr("I/O"))) << size;
  }
  put(good + '\0');
  EXPECT_THAT(error_of([&] { reslora::load_tensors(path_); }), HasSubstr("19 bytes of data"));
}

TEST_F(AdapterIo, MutatedFilesAreRefusedOrConsistent) {
  reslora::save_tensors(path_, small_file());
  const std::string good = content();
  std::mt19937 random(3);
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string bytes = good;
    const unsigned count = 1 + (i % 3 == 0 ? random() % 5 : 0);
    for (unsigned k = 0; k < count; ++k)
      bytes[random() % bytes.size()] = static_cast<char>(random());
    put(bytes);
    try {
      for (const auto& [name, tensor] : reslora::load_tensors(path_).tensors) {
        ASSERT_LE(tensor.nbytes(), 19U) << name;
        tensor.clone();  // touches every byte
      }
    } catch (const c10::ValueError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 500);
}

TEST_F(AdapterIo, RefusesABoolThatIsNeither0Nor1) {
  reslora::save_tensors(path_, {{{"b", at::ones({3}, at::kBool)}}, {}});
  std::string bytes = content();
  bytes.back() = 2;
  put(bytes);
  EXPECT_THAT(error_of([&] { reslora::load_tensors(path_); }), HasSubstr("bytes 0 and 1 only"));
}

reslora::AdapterFile sample_adapter() {
  reslora::AdapterFile adapter;
  adapter.config_json = R"({"r": 2, "res_mode": "is", "target_modules": ["q"]})";
  adapter.chains = {{"q", {{"l.0.q", 4, 3, 2, 0.1}, {"l.1.q", 4, 3, 1, 2}}},
                    {"v", {{"v", 5, 6, 2, 1}}}};
  for (const auto& chain : adapter.chains) {
    for (const auto& layer : chain.layers) {
      adapter.tensors[layer.name + ".reslora_A.weight"] = at::randn({layer.r, layer.in_features});
      adapter.tensors[layer.name + ".reslora_B.weight"] = at::randn({layer.out_features, layer.r});
    }
  }
  adapter.tensors["score.weight"] = at::randn({2, 2});
  return adapter;
}

TEST_F(AdapterIo, AnAdapterRoundTrips) {
  const reslora::AdapterFile adapter = sample_adapter();
  reslora::save_adapter(path_, adapter);
  const reslora::AdapterFile got = reslora::load_adapter(path_);
  EXPECT_EQ(got.config_json, adapter.config_json);
  ASSERT_EQ(got.chains.size(), 2U);
  EXPECT_EQ(got.chains[0].name, "q");
  const reslora::LayerShape& layer = got.chains[0].layers.at(1);
  EXPECT_EQ(layer.name, "l.1.q");
  EXPECT_EQ(layer.in_features, 4);
  EXPECT_EQ(layer.out_features, 3);
  EXPECT_EQ(layer.r, 1);
  EXPECT_EQ(got.chains[0].layers.at(0).scaling, 0.1);
  ASSERT_EQ(got.tensors.size(), adapter.tensors.size());
  for (const auto& [name, tensor] : adapter.tensors)
    expect_same(got.tensors.at(name), tensor, name);
  EXPECT_EQ(reslora::load_tensors(path_).metadata.at("format"), "pt");
}

TEST_F(AdapterIo, AnAdapterThatDoesNotFitItsChainsIsNotWritten) {
  const auto refused = [&](const std::function<void(reslora::AdapterFile&)>& spoil) {
    reslora::AdapterFile adapter = sample_adapter();
    spoil(adapter);
    return error_of([&] { reslora::save_adapter(path_, adapter); });
  };
  EXPECT_EQ(refused([](auto&) {}), "");
  ::unlink(path_.c_str());
  EXPECT_THAT(refused([](auto& it) { it.tensors.erase("v.reslora_A.weight"); }),
              HasSubstr("'v.reslora_A.weight' is missing"));
  EXPECT_THAT(refused([](auto& it) {
                it.tensors["v.reslora_B.weight"] = at::ones({6, 3});
              }),
              HasSubstr("must be floating point [6, 2], as the chains say; got Float [6, 3]"));
  EXPECT_THAT(refused([](auto& it) { it.tensors["v.reslora_B.weight"] = at::Tensor(); }),
              HasSubstr("got none"));
  EXPECT_THAT(refused([](auto& it) {
                it.tensors["v.reslora_A.weight"] = at::ones({2, 5}, at::kLong);
              }),
              HasSubstr("got Long"));
  EXPECT_THAT(refused([](auto& it) {
                it.tensors["z.reslora_A.weight"] = at::ones({2, 2});
              }),
              HasSubstr("'z.reslora_A.weight' belongs to a layer that no chain names"));
  EXPECT_THAT(refused([](auto& it) { it.chains.clear(); }), HasSubstr("must have a chain"));
  EXPECT_THAT(refused([](auto& it) { it.chains[0].layers.clear(); }),
              HasSubstr("must have a layer"));
  EXPECT_THAT(refused([](auto& it) { it.chains[1].name = "q"; }), HasSubstr("got 'q' twice"));
  EXPECT_THAT(refused([](auto& it) { it.chains[1].layers = it.chains[0].layers; }),
              HasSubstr("'l.0.q' must be in one chain, once"));
  EXPECT_THAT(refused([](auto& it) { it.chains[1].layers[0].r = 0; }), HasSubstr("r 0"));
  EXPECT_THAT(refused([](auto& it) { it.chains[1].layers[0].scaling = NAN; }), HasSubstr("finite"));
  EXPECT_THAT(refused([](auto& it) { it.config_json = "{"; }), HasSubstr("reslora.config"));
  EXPECT_THAT(refused([](auto& it) { it.config_json = "[]"; }), HasSubstr("must have an object"));
  EXPECT_TRUE(names().empty());
}

// The bytes of a good adapter file with `from` replaced by `to` of the same length.
std::string altered(const std::string& good, const std::string& from, const std::string& to) {
  std::string bytes = good;
  const size_t at = bytes.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return bytes.replace(at, from.size(), to);
}

TEST_F(AdapterIo, RefusesAnAdapterThatWasAltered) {
  reslora::save_adapter(path_, sample_adapter());
  const std::string good = content();
  const auto message = [&](const std::string& bytes) {
    put(bytes);
    return error_of([&] { reslora::load_adapter(path_); });
  };
  EXPECT_EQ(message(good), "");
  std::string flipped = good;
  flipped.back() = static_cast<char>(flipped.back() ^ 1);
  EXPECT_THAT(message(flipped), HasSubstr("the file was damaged or altered"));
  EXPECT_THAT(message(altered(good, R"(\"scaling\":2)", R"(\"scaling\":3)")), HasSubstr("altered"));
  EXPECT_THAT(message(altered(good, R"(\"r\": 2)", R"(\"r\": 3)")), HasSubstr("altered"));
  EXPECT_THAT(message(altered(good, "score.weight", "scOre.weight")), HasSubstr("altered"));
  EXPECT_THAT(message(altered(good, R"("shape":[2,2])", R"("shape":[4,1])")), HasSubstr("altered"));
  EXPECT_THAT(message(good.substr(0, good.size() - 1)), HasSubstr("bytes of data"));
}

TEST_F(AdapterIo, RefusesOtherFormatsByName) {
  reslora::save_adapter(path_, sample_adapter());
  const reslora::TensorFile good = reslora::load_tensors(path_);
  const auto message = [&](const std::function<void(std::map<std::string, std::string>&)>& spoil) {
    reslora::TensorFile file = good;
    spoil(file.metadata);
    reslora::save_tensors(path_, file);
    return error_of([&] { reslora::load_adapter(path_); });
  };
  EXPECT_EQ(message([](auto&) {}), "");
  EXPECT_THAT(message([](auto& m) { m.erase("reslora.format"); }),
              HasSubstr("PeftModel.from_pretrained"));
  const std::string newer = message([](auto& m) {
    m["reslora.format"] = "3";
    m["reslora.version"] = "9.1.0";
    m.erase("reslora.chains");
  });
  EXPECT_THAT(newer, HasSubstr("reads adapter formats 1 to 2; got format 3"));
  EXPECT_THAT(newer, HasSubstr("9.1.0"));
  EXPECT_THAT(message([](auto& m) { m["reslora.format"] = "one"; }), HasSubstr("must be a number"));
  EXPECT_THAT(message([](auto& m) { m["reslora.format"] = "0"; }), HasSubstr("got format 0"));
  for (const char* key : {"reslora.config", "reslora.chains", "reslora.sha256"}) {
    EXPECT_THAT(message([&](auto& m) { m.erase(key); }), HasSubstr(key));
  }
}

TEST_F(AdapterIo, WarnsOfAnAdapterThatChangesNothing) {
  reslora::AdapterFile adapter = sample_adapter();
  for (auto& [name, tensor] : adapter.tensors) tensor.zero_();
  reslora::testing::Warnings warnings;
  reslora::save_adapter(path_, adapter);
  reslora::load_adapter(path_);
  ASSERT_FALSE(warnings.all.empty());
  EXPECT_THAT(warnings.all[0], HasSubstr("every B is zero"));
  warnings.all.clear();
  reslora::save_adapter(path_, sample_adapter());
  reslora::load_adapter(path_);
  EXPECT_TRUE(warnings.all.empty());
}

TEST_F(AdapterIo, APlainLoraNamesTheRevisionOfItsBaseWhereThereIsOne) {
  reslora::PlainLora lora;
  lora.layers.resize(1);
  lora.layers[0].name = "l.0.q";
  lora.layers[0].A = at::ones({1, 4});
  lora.layers[0].B = at::ones({3, 1});
  path_ = folder_ + "/adapter_config.json";
  reslora::save_plain_lora(folder_, lora);
  EXPECT_THAT(content(), HasSubstr("\"revision\": null"));
  lora.revision = "v2";
  reslora::save_plain_lora(folder_, lora);
  EXPECT_THAT(content(), HasSubstr("\"revision\": \"v2\""));
}

TEST_F(AdapterIo, MutatedAdaptersAreRefused) {
  reslora::save_adapter(path_, sample_adapter());
  const std::string good = content();
  std::mt19937 random(5);
  int refused = 0;
  for (int i = 0; i < 500; ++i) {
    std::string bytes = good;
    char& byte = bytes[random() % bytes.size()];
    byte = static_cast<char>(byte ^ (1U << random() % 8));
    put(bytes);
    try {
      const reslora::AdapterFile got = reslora::load_adapter(path_);
      // What no rule protects: the version, the format note, white space.
      EXPECT_EQ(got.config_json, sample_adapter().config_json);
      EXPECT_EQ(got.tensors.size(), 7U);
    } catch (const c10::ValueError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 400);
}

}  // namespace
