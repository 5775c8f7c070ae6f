// What the public calls of files refuse.
#include "refusals.h"

#include <reslora/adapted_files.h>
#include <reslora/adapter_folder.h>
#include <reslora/config_json.h>
#include <reslora/merge_files.h>
#include <reslora/plain_lora.h>
#include <reslora/stage.h>
#include <reslora/statistics_io.h>

#include "io/in_folder.h"

namespace reslora {
namespace {

using testing::refuse_nothing;
using testing::refuses_call;
using testing::refuses_tensors;
using testing::Wrong;

// What a file can hold besides: any shape, any dtype.
const std::set<Wrong> kHeld = {Wrong::kColumns, Wrong::kDims, Wrong::kDtype};
const std::string kA = "m.0.q.reslora_A.weight", kB = "m.0.q.reslora_B.weight";

AdapterFile good_adapter() {
  AdapterFile adapter;
  adapter.config_json = config_to_json(ResLoraConfig().r(2).lora_alpha(1).res_mode("none"));
  adapter.chains = {{"m.*.q", {{"m.0.q", 4, 5, 2, 0.5}}}};
  adapter.tensors = {{kA, at::randn({2, 4})}, {kB, at::randn({5, 2})}};
  return adapter;
}

LayerMerge good_pair() {
  LayerMerge layer;
  layer.name = "m.0.q";
  layer.A = at::randn({2, 4});
  layer.B = at::randn({5, 2});
  return layer;
}

class IoRefusals : public testing::InFolder {
 protected:
  void SetUp() override {
    InFolder::SetUp();
    save_tensors(path("base"), {{{"m.0.q.weight", at::randn({5, 4})}}, {}});
    std::filesystem::create_directory(path("adapter"));
    save_adapter(path("adapter/") + kWeightsName, good_adapter());
    write_text(path("adapter/") + kConfigName, good_adapter().config_json);
  }

  /// Rows for what is given an adapter with one wrong tensor.
  void of_factors(const char* function, const std::function<void(const AdapterFile&)>& call) {
    for (const std::string& key : {kA, kB})
      refuses_tensors(function, key.c_str(), good_adapter().tensors.at(key),
                      [&](const at::Tensor& tensor) {
                        AdapterFile adapter = good_adapter();
                        adapter.tensors[key] = tensor;
                        call(adapter);
                      });
    AdapterFile lacking = good_adapter();
    lacking.tensors.erase(kA);
    refuses_call(
        function, "A that is missing", [&] { call(lacking); }, kA);
    AdapterFile bad = good_adapter();
    bad.config_json = "{";
    refuses_call(
        function, "config", [&] { call(bad); }, "");
  }

  /// Rows for what is given a pair with one wrong tensor; a wider A alone may be another layer's.
  void of_pair(const char* function, const std::function<void(const LayerMerge&)>& call,
               const std::set<Wrong>& accepted = {}) {
    for (at::Tensor LayerMerge::*member : {&LayerMerge::A, &LayerMerge::B})
      refuses_tensors(
          function, member == &LayerMerge::A ? "A" : "B", good_pair().*member,
          [&](const at::Tensor& tensor) {
            LayerMerge layer = good_pair();
            layer.*member = tensor;
            call(layer);
          },
          member == &LayerMerge::A ? accepted : std::set<Wrong>());
  }
};

TEST_F(IoRefusals, Tensors) {
  const at::Tensor good = at::randn({2, 3});
  refuses_tensors(
      "save_tensors", "tensors", good,
      [&](const at::Tensor& x) {
        save_tensors(path("x"), {{{"x", x}}, {}});
      },
      kHeld);
  refuses_tensors(
      "tensors_sum", "tensors", good,
      [](const at::Tensor& x) {
        tensors_sum({{"x", x}});
      },
      kHeld);
  refuses_tensors("check_tensors", "model", good,
                  [&](const at::Tensor& x) {
                    check_tensors({{"x", x}}, {{"x", good}});
                  },
                  {Wrong::kDtype, Wrong::kMeta, Wrong::kSparse});  // shapes alone are compared
  refuses_tensors("check_tensors", "file", good,
                  [&](const at::Tensor& x) {
                    check_tensors({{"x", good}}, {{"x", x}});
                  },
                  {Wrong::kDtype, Wrong::kMeta, Wrong::kSparse});
  std::set<Wrong> fits = kHeld;
  fits.insert(Wrong::kMeta);  // it gets its values later
  refuses_tensors(
      "check_head", "head", good, [](const at::Tensor& x) { check_head("x", x); }, fits);
  write_text(path("text"), "no tensors");
  refuses_call(
      "load_tensors", "content", [&] { load_tensors(path("text")); }, "load_tensors");
  refuses_call(
      "load_adapter", "content", [&] { load_adapter(path("base")); }, "not an unmerged");
  refuses_call(
      "sum_in_header", "content", [&] { sum_in_header(path("text")); }, "load_adapter");
  write_text(path("adapter/") + kWeightsName, "no tensors");
  refuses_call(
      "load_saved_adapter", "content", [&] { load_saved_adapter(path("adapter")); },
      "load_adapter");
}

TEST_F(IoRefusals, Adapters) {
  of_factors("save_adapter", [&](const auto& adapter) { save_adapter(path("a"), adapter); });
  Stage stage(path("staged"));
  of_factors("stage_adapter", [&](const auto& adapter) { stage_adapter(stage, adapter); });
  of_factors("plan_adapter", [](const auto& adapter) { plan_adapter(adapter, {}, ""); });
  of_factors("AdaptedFiles::plan", [&](const auto& adapter) {
    AdaptedFiles(ModelFiles({path("base")}), adapter).plan({}, "");
  });
  AdapterFile other = good_adapter();
  other.chains[0].layers[0].name = "m.1.q";
  refuses_call(
      "AdaptedFiles::AdaptedFiles", "another base",
      [&] { AdaptedFiles(ModelFiles({path("base")}), other); }, "got none for m.1.q");
  other.config_json = R"({"fan_in_fan_out": 3})";
  refuses_call(
      "transposed_chains", "config", [&] { transposed_chains(other); }, "must list");
  other.config_json = R"({"other_places": ["m.0.q"]})";
  refuses_call(
      "other_places", "config", [&] { other_places(other); }, "must list");
  other.config_json = R"({"other_places": {"m.0.q": ["m.1.q"]}})";
  refuses_call(
      "check_one_place", "config", [&] { check_one_place(other); }, "hangs at m.1.q too");
  refuses_call(
      "check_ranks", "another r",
      [] {
        check_ranks(ResLoraConfig().r(4), {{"c", {{"l", 4, 4, 2, 1}}}});
      },
      "must agree on a layer's r and scaling; got 4");
  refuses_call(
      "check_formula", "options",
      [] { check_formula(ResLoraConfig().res_mode("is"), ResLoraConfig().res_mode("ms")); },
      "must agree on res_mode");
  write_text(path("adapter/") + kConfigName, "{}");
  refuses_call(
      "load_adapter_folder", "config", [&] { load_adapter_folder(path("adapter")); }, "");
  refuse_nothing({"key_of_a", "key_of_b", "is_factor"});
}

TEST_F(IoRefusals, EditsOfABase) {
  AdapterFile adapter = good_adapter();
  const auto edits_of = [&](const std::string& layer, const at::Tensor& head) {
    adapter.tensors["head.weight"] = head;
    const AdaptedFiles files(ModelFiles({path("base")}), adapter);
    LayerView view{at::randn({5, 4}), at::randn({2, 4}), at::randn({5, 2}), {}};
    const MergePlan plan({{Chain(ResLoraConfig().res_mode("none"), {{layer, 4, 5, 2, 1}}), {view}}},
                         "");
    ModelFiles({path("base")}).write(path("out"), {"head.weight"}, files.edits(plan), {});
  };
  refuses_tensors(
      "AdaptedFiles::edits", "head", at::randn({2, 3}),
      [&](const at::Tensor& head) { edits_of("m.0.q", head); }, kHeld);
  refuses_call(
      "AdaptedFiles::edits", "another plan", [&] { edits_of("m.7.q", at::ones({1})); },
      "got layer m.7.q");
}

TEST_F(IoRefusals, ModelFilesAndTheirEdits) {
  const ModelFiles files({path("base")});
  const auto write = [&](const TensorEdit& edit) {
    files.write(path("out"), {"m.0.q.weight"}, {{"m.0.q.weight", edit}}, {});
  };
  of_pair("ModelFiles::write", [&](const LayerMerge& layer) {
    TensorEdit edit;
    edit.layer = layer;
    write(edit);
  });
  refuses_tensors(
      "ModelFiles::write", "replacement", at::randn({5, 4}),
      [&](const at::Tensor& tensor) {
        TensorEdit edit;
        edit.replacement = tensor;
        write(edit);
      },
      kHeld);
  refuses_call(
      "ModelFiles::write", "name", [&] { files.write(path("out"), {"x"}, {}, {}); }, "got 'x'");
  refuses_call(
      "ModelFiles::write", "dtype",
      [&] {
        files.write(path("out"), {}, {}, {at::kInt, {}, {}});
      },
      "dtype must be");
  write_text(path("text"), "no tensors");
  refuses_call(
      "ModelFiles::ModelFiles", "content", [&] { ModelFiles({path("text")}); }, "model_files");
  refuses_call(
      "ModelFiles::tensor", "name", [&] { files.tensor("x"); }, "got 'x'");
  refuses_call(
      "ModelFiles::path_of", "name", [&] { files.path_of("x"); }, "got 'x'");
  refuses_call(
      "ModelFiles::metadata_of", "path", [&] { files.metadata_of("x"); }, "got 'x'");
  refuses_call(
      "ModelFiles::names_by_path", "no files", [] { ModelFiles({}).names_by_path({}); },
      "got none");
  refuses_call(
      "merge_files", "no files", [&] { merge_files({}, path("adapter"), path("merged")); },
      "got none");
  refuses_call(
      "merge_files", "an output that is there",
      [&] { merge_files({path("base")}, path("adapter"), folder_); }, "must be a new file");
  refuse_nothing({"ModelFiles::names", "ModelFiles::contains", "ModelFiles::check_unchanged"});
}

TEST_F(IoRefusals, PlainLora) {
  const std::set<Wrong> wider = {Wrong::kColumns};
  of_pair(
      "padded_factors", [](const LayerMerge& layer) { padded_factors(layer, 3); }, wider);
  of_pair(
      "reduced_factors", [](const LayerMerge& layer) { reduced_factors(layer, 1); }, wider);
  of_pair(
      "save_plain_lora", [&](const auto& layer) { save_plain_lora(path("l"), {{layer}}); }, wider);
  refuses_call(
      "padded_factors", "R", [] { padded_factors(good_pair(), 1); }, "at least the layer's");
  refuses_call(
      "reduced_factors", "rank", [] { reduced_factors(good_pair(), 0); }, "rank must be");
  for (const auto& [r, in] : {std::pair<int64_t, int64_t>{0, 4}, {2, 0}}) {
    LayerMerge empty = good_pair();
    empty.A = at::zeros({r, in});
    empty.B = at::zeros({3, r});
    refuses_call(
        "reduced_factors", "empty", [&, empty] { reduced_factors(empty, 1); }, "must not be empty");
  }
  refuses_call(
      "reduced_factors", "tolerance", [] { reduced_factors(good_pair(), 1, NAN); }, "got nan");
  refuses_call(
      "save_plain_lora", "no layers", [&] { save_plain_lora(path("l"), {}); }, "got none");
  refuses_call(
      "save_plain_lora", "one name for two",
      [&] {
        save_plain_lora(path("l"), {{good_pair(), good_pair()}});
      },
      "got m.0.q twice");
  refuses_tensors(
      "save_plain_lora", "heads", at::randn({2, 3}),
      [&](const at::Tensor& head) {
        save_plain_lora(path("l"), {{good_pair()}, {{"head.weight", head}}});
      },
      kHeld);
  refuse_nothing({"rank_warning"});
}

TEST_F(IoRefusals, Statistics) {
  const auto save = [&](const LayerStatistics& own) {
    save_statistics(path("s"), "sum", {{"m.0.q", own}});
    EXPECT_NO_THROW(load_statistics(path("s"), "sum"));  // what is written can be read
  };
  Fit fit;
  fit.A = at::randn({2, 4});
  fit.B = at::randn({5, 2});
  fit.affine_A = at::randn({2, 4});
  fit.offset = at::randn({2});
  const auto d = at::kDouble;
  const FitSums sums{
      at::eye(4, d), at::zeros({2, 4}, d), at::zeros({4}, d), at::zeros({2}, d), 1, 9};
  const auto of_fit = [&](at::Tensor Fit::*member) {
    return [&, member](const at::Tensor& tensor) {
      Fit own = fit;
      own.*member = tensor;
      save({{}, own, {}});
    };
  };
  const auto of_sums = [&](at::Tensor FitSums::*member) {
    return [&, member](const at::Tensor& tensor) {
      FitSums own = sums;
      own.*member = tensor;
      save({{}, {}, own});
    };
  };
  // One dtype is written for all tensors of a fit, whatever they have.
  const std::set<Wrong> cast = {Wrong::kDtype}, cast_or_none = {Wrong::kDtype, Wrong::kUndefined};
  refuses_tensors("save_statistics", "fit.A", fit.A, of_fit(&Fit::A), cast_or_none);
  refuses_tensors("save_statistics", "fit.B", fit.B, of_fit(&Fit::B), cast_or_none);
  refuses_tensors("save_statistics", "affine_A", fit.affine_A, of_fit(&Fit::affine_A),
                  cast_or_none);
  refuses_tensors("save_statistics", "offset", fit.offset, of_fit(&Fit::offset), cast_or_none);
  refuses_tensors("save_statistics", "xx", sums.xx, of_sums(&FitSums::xx));
  refuses_tensors("save_statistics", "vx", sums.vx, of_sums(&FitSums::vx));
  refuses_tensors("save_statistics", "x_sum", sums.x_sum, of_sums(&FitSums::x_sum));
  refuses_tensors("save_statistics", "v_sum", sums.v_sum, of_sums(&FitSums::v_sum));
  save({{}, fit, sums});
  refuses_call(
      "load_statistics", "sum", [&] { load_statistics(path("s"), "other"); }, "another one");
  std::filesystem::rename(path("s"), path("adapter/") + kStatisticsName);
  refuses_call(
      "statistics_beside", "another adapter",
      [&] { statistics_beside(path("adapter"), good_adapter()); }, "another one");
}

TEST_F(IoRefusals, Stages) {
  for (const char* name : {"", ".", "..", "/a", "a//b", "a/../b", "../a"}) {
    Stage stage(folder_);
    refuses_call(
        "Stage::path", "name", [&] { stage.path(name); }, "a name of its own");
    refuses_call(
        "Stage::remove", "name", [&] { stage.remove(name); }, "a name of its own");
  }
  Stage stage(path("new"));
  stage.commit();
  refuses_call(
      "Stage::path", "over", [&] { stage.path("a"); }, "one that is over");
  refuses_call(
      "Stage::remove", "over", [&] { stage.remove("a"); }, "one that is over");
  refuses_call(
      "Stage::commit", "over", [&] { stage.commit(); }, "one that is over");
  refuses_call(
      "Stage::Stage", "a file", [&] { Stage(path("base")); }, "must be a folder");
  refuse_nothing({"Stage::discard", "Stage::place", "write_text", "finish_saves"});
}

}  // namespace
}  // namespace reslora
