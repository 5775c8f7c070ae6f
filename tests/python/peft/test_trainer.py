"""ResLoRA in transformers' Trainer: checkpoints, resume, evaluation, and the callback."""

import json
import math

import pytest
import torch
from models import randomize, tiny_llama, tokens

import reslora
from reslora.injection.adapted import find_layers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
from transformers import Trainer, TrainingArguments  # noqa: E402

from reslora.peft import ResLoraConfig  # noqa: E402
from reslora.trainer import ResLoraCallback, alphas  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]


def examples(count=24, length=8):
    torch.manual_seed(11)
    ids = tokens(count, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def base_model():
    torch.manual_seed(0)
    return tiny_llama()


def peft_model(seed=0, **changes):
    options = {"r": 4, "target_modules": TARGETS, "res_mode": "is", "task_type": "CAUSAL_LM"}
    base = base_model()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, ResLoraConfig(**options | changes))


def injected_model(seed=0, **changes):
    options = {"r": 4, "target_modules": TARGETS, "res_mode": "is"}
    base = base_model()
    torch.manual_seed(seed)
    return reslora.inject(base, reslora.ResLoraConfig(**options | changes))


def trainer(model, folder, callback=None, **changes):
    options = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "report_to": [],
        "use_cpu": True, "seed": 3, "disable_tqdm": True,
    }  # fmt: skip
    made = Trainer(
        model=model,
        args=TrainingArguments(**options | changes),
        train_dataset=examples(),
        eval_dataset=examples(8),
    )
    if callback is not None:
        callback.add_to(made)
    return made


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", [peft_model, injected_model])
@pytest.mark.parametrize("res_mode", ["is", "bs", "ms"])
def test_resumed_training_has_equal_losses(tmp_path, make, res_mode):
    whole = trainer(make(res_mode=res_mode), tmp_path / "a", ResLoraCallback())
    whole.train()
    assert all(layer.reslora_B.any() for layer in find_layers(whole.model))
    resumed = trainer(make(seed=9, res_mode=res_mode), tmp_path / "a", ResLoraCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {
            "torch_compile": True,
            "torch_compile_backend": "aot_eager",
            "gradient_checkpointing": True,
        },
    ],
    ids=["checkpointing", "accumulation", "bf16", "compile", "both"],
)
def test_options_of_the_trainer(tmp_path, changes):
    plain = trainer(peft_model(), tmp_path / "a", per_device_train_batch_size=4)
    plain.train()
    other = trainer(peft_model(), tmp_path / "b", **changes)
    other.train()
    relative = 0.05 if "bf16" in changes else 1e-4
    if changes.get("gradient_accumulation_steps"):
        assert all(layer.reslora_B.any() for layer in find_layers(other.model))
    else:
        assert losses(other) == pytest.approx(losses(plain), rel=relative)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    made = trainer(
        peft_model(), tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        learning_rate=0.5,
    )  # fmt: skip
    made.train()
    best = made.state.best_metric
    assert made.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_the_callback_logs_alphas_and_gradient_norms(tmp_path):
    made = trainer(peft_model(), tmp_path, ResLoraCallback())
    made.train()
    entry = [e for e in made.state.log_history if "loss" in e][-1]
    keys = [key for key in entry if key.startswith("reslora/alpha/")]
    assert len(keys) == 3
    assert entry[keys[0]] == pytest.approx(
        alphas(find_layers(made.model)[0].chain.injection)[keys[0]]
    )
    assert 0 < entry["reslora/grad_norm_A"] < math.inf
    assert 0 < entry["reslora/grad_norm_B"] < math.inf


def test_reports_see_the_numbers(tmp_path):
    seen = []

    class Report(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    made = trainer(peft_model(), tmp_path)
    made.add_callback(Report())
    ResLoraCallback().add_to(made)
    made.train()
    assert any("reslora/grad_norm_B" in entry for entry in seen)


@pytest.mark.parametrize("res_mode", ["is", "bs"])
def test_the_merged_form_is_evaluated(tmp_path, res_mode):
    made = trainer(
        peft_model(res_mode=res_mode), tmp_path, ResLoraCallback(), eval_strategy="steps",
        eval_steps=3,
    )  # fmt: skip
    made.train()
    entries = [e for e in made.state.log_history if "eval_loss" in e]
    assert len(entries) == 2
    own, merged = entries[-1]["eval_loss"], entries[-1]["eval_merged_loss"]
    if res_mode == "bs":
        assert merged == pytest.approx(own, rel=1e-5)
    else:
        assert merged == pytest.approx(own, rel=0.2)
        assert merged != pytest.approx(own, rel=1e-7)
    assert not any(layer.is_merged for layer in find_layers(made.model))


def test_finish_happens_once_and_is_resumed(tmp_path):
    callback = ResLoraCallback()
    made = trainer(peft_model(finish_at=0.5), tmp_path, callback, save_steps=4)
    made.train()
    entries = [e for e in made.state.log_history if "reslora/finished_step" in e]
    assert [entry["reslora/finished_step"] for entry in entries] == [3]
    config = made.model.peft_config["default"]
    assert (config.res_mode, config.finished_from, config.finished_step) == ("none", "is", 3)
    stored = json.loads((tmp_path / "checkpoint-4/adapter_config.json").read_text())
    assert stored["res_mode"] == "none"
    resumed = trainer(peft_model(seed=9, finish_at=0.5), tmp_path, ResLoraCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed)[-2:] == pytest.approx(losses(made)[-2:], rel=1e-6)
    assert resumed.model.peft_config["default"].finished_from == "is"
    elsewhere = trainer(peft_model(seed=9, finish_at=0.5), tmp_path / "other", ResLoraCallback())
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(elsewhere)[-2:] == pytest.approx(losses(made)[-2:], rel=1e-6)
    made.model.eval()
    ids = tokens()
    wanted = made.model(input_ids=ids).logits
    merged = made.model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_the_best_checkpoint_is_one_of_the_finished_model(tmp_path):
    made = trainer(
        peft_model(finish_at=0.5), tmp_path, ResLoraCallback(), eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    made.train()
    assert int(made.state.best_model_checkpoint.rsplit("-", 1)[1]) > 3
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric, rel=1e-5)


def test_evaluating_the_merged_form_does_not_change_the_training(tmp_path):
    found = []
    for evaluate_merged in (False, True):
        callback = ResLoraCallback(evaluate_merged=evaluate_merged)
        model = peft_model(lora_dropout=0.3)
        made = trainer(model, tmp_path, callback, eval_strategy="steps", eval_steps=2)
        made.train()
        found.append(losses(made))
    assert found[0] == found[1]


def test_a_checkpoint_of_another_formula_is_refused(tmp_path):
    trainer(peft_model(res_mode="ms"), tmp_path, ResLoraCallback()).train()
    other = trainer(peft_model(res_mode="is"), tmp_path, ResLoraCallback())
    with pytest.raises(ValueError, match='must agree on res_mode; got "is" and "ms"'):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_norms_are_saved_and_taken_up(tmp_path):
    made = trainer(peft_model(), tmp_path, ResLoraCallback())
    made.train()
    folder = tmp_path / "checkpoint-6"
    assert (folder / "adapter_statistics.safetensors").is_file()
    read = reslora.load(base_model(), folder)
    for own, other in zip(find_layers(made.model), find_layers(read), strict=True):
        torch.testing.assert_close(own.norms, other.norms)
    assert reslora.merge(read).rule == "projected"


def test_an_adapter_that_does_not_train_is_reported(tmp_path):
    made = trainer(peft_model(), tmp_path, ResLoraCallback(), learning_rate=0.0)
    with pytest.warns(UserWarning, match=r"B of 9 of 9 layers is still zero after 3 steps"):
        made.train()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"merge_method": "best"}, "merge_method must be .*; got 'best'"),
        ({"patience": 0}, "patience must be a whole number above 0; got 0"),
        ({"patience": True}, "patience must be a whole number above 0; got True"),
        ({"calibration": []}, r"calibration must be batches, or None; got \[\]"),
        ({"calibration": "x"}, "calibration must be batches, or None; got 'x'"),
        ({"calibration": 5}, "calibration must be batches, or None; got 5"),
        ({"max_eval_batches": 0.5}, "max_eval_batches must be a whole number above 0; got 0.5"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ResLoraCallback(**options)


@pytest.mark.parametrize("method", ["exact", "lsq"])
def test_a_rule_that_cannot_merge_is_refused_before_the_first_step(tmp_path, method):
    made = trainer(peft_model(res_mode="is"), tmp_path, ResLoraCallback(merge_method=method))
    with pytest.raises(ValueError, match="merge_method must be one that can merge this model"):
        made.train()
    assert made.state.global_step == 0


def test_evaluations_keep_their_names(tmp_path):
    data = {"a": examples(8), "b": examples(4)}
    made = trainer(
        peft_model(res_mode="bs"), tmp_path, ResLoraCallback(), eval_strategy="steps", eval_steps=6
    )
    made.eval_dataset = data
    made.train()
    found = {key: value for entry in made.state.log_history for key, value in entry.items()}
    for name in data:
        assert found[f"eval_{name}_merged_loss"] == pytest.approx(found[f"eval_{name}_loss"])


def test_a_model_without_a_loss_of_its_own_is_not_evaluated_merged(tmp_path):
    class Bare(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, **kwargs):
            return {"logits": self.inner(input_ids=input_ids).logits}

    def loss(output, labels, **kwargs):
        return torch.nn.functional.cross_entropy(output["logits"].flatten(0, 1), labels.flatten())

    made = trainer(
        Bare(peft_model(res_mode="bs")), tmp_path, ResLoraCallback(), eval_strategy="steps",
        eval_steps=3, label_names=["labels"], save_strategy="no",
    )  # fmt: skip
    made.compute_loss_func = loss
    with pytest.warns(UserWarning, match="its merged form is not evaluated"):
        made.train()
    assert made.state.global_step == 6


def test_a_plain_model_is_refused(tmp_path):
    made = trainer(tiny_llama(), tmp_path, ResLoraCallback())
    with pytest.raises(ValueError, match="model must be adapted"):
        made.train()


def test_merged_loss_leaves_no_trace():
    model = randomize(peft_model(), 0.2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    batch = {"input_ids": tokens(), "labels": tokens()}
    model.train()
    assert ResLoraCallback().merged_loss(model, [batch]) is None  # no norms yet
    found = ResLoraCallback(calibration=[batch] * 4).merged_loss(model, [batch])
    assert found is not None and math.isfinite(found)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert find_layers(model)[0].chain.injection.calibrated is None
