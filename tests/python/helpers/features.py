"""What PEFT's LoRA offers, whether ResLoRA does, and the test that shows it.

    python tests/python/helpers/features.py    # writes the table into examples/guides/peft.md

A line without a test says why there is none.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
GUIDE = TESTS.parents[1] / "examples/guides/peft.md"
BEGIN, END = "<!-- features: begin -->", "<!-- features: end -->"

PEFT = "test_peft.py::"
PEFT_FILES = "test_peft_files.py::"
# (feature, test or reason)
FEATURES = (
    ("`get_peft_model`", PEFT + "test_outputs_and_gradients_are_those_of_an_injected_model"),
    ("step 0 equals the base model", PEFT + "test_step_zero_is_the_base_model"),
    ("`target_modules`: names, suffixes, regular expressions",
     "test_targets.py::test_suffixes_match_whole_parts_of_a_name"),
    ('`"all-linear"`', "test_targets.py::test_all_linear_leaves_out_the_output_head"),
    ("default targets", "test_families.py::test_a_family_is_linked_trained_merged_and_exported"),
    ("`exclude_modules`, `layers_to_transform`, `layers_pattern`",
     "test_targets.py::test_exclude_modules_and_layers_to_transform"),
    ("`rank_pattern`, `alpha_pattern`", PEFT_FILES + "test_save_and_from_pretrained"),
    ("`modules_to_save`, heads of `task_type`",
     PEFT_FILES + "test_a_trained_head_is_saved_and_loaded"),
    ("`use_rslora`",
     "test_starting.py::test_rank_stabilised_scaling_works_with_every_shortcut"),
    ("transformers' `Conv1D`", PEFT_FILES + "test_convert_to_lora"),
    ("several named adapters, one active", PEFT + "test_named_adapters_with_one_active"),
    ("`load_adapter`, `set_adapter`, `delete_adapter`",
     PEFT + "test_a_second_adapter_is_loaded_beside_the_first"),
    ("`set_scale`, `scale_layer`, `unscale_layer`",
     "test_strength.py::test_the_strength_of_all_layers_is_another_lora_alpha"),
    ("`disable_adapter`", PEFT + "test_disable_adapter_is_the_base_model"),
    ("`merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `safe_merge`",
     PEFT_FILES + "test_exact_merges_change_nothing"),
    ("`unload`", PEFT_FILES + "test_unload_gives_the_base_model_back"),
    ("`save_pretrained`, `from_pretrained`, `low_cpu_mem_usage`",
     PEFT_FILES + "test_save_and_from_pretrained"),
    ("`save_embedding_layers`: a resized vocabulary",
     "test_embeddings.py::test_they_are_saved_and_loaded"),
    ("`AutoPeftModel`", PEFT_FILES + "test_auto_peft_model"),
    ("`get_layer_status`, `print_trainable_parameters`, `targeted_module_names`",
     PEFT + "test_status_and_counts"),
    ("`inject_adapter_in_model`", PEFT + "test_inject_adapter_in_model"),
    ("transformers' `add_adapter`, `load_adapter`, where it takes the peft there is",
     PEFT + "test_add_adapter_of_transformers"),
    ("`convert_to_lora`", PEFT_FILES + "test_convert_to_lora"),
    ("a plain LoRA of it", PEFT_FILES + "test_export_lora_of_a_peft_model"),
    ("adapters in fp32 beside a base of low precision",
     PEFT + "test_low_precision_bases_get_fp32_adapters"),
    ("quantised bases: torchao, bitsandbytes",
     "test_quantized.py::test_a_quantised_base_is_trained_saved_loaded_and_merged"),
    ("bases that accelerate offloads",
     "test_devices.py::test_a_base_that_is_offloaded_is_adapted_where_it_runs"),
    ("LoRA+: `create_loraplus_optimizer`",
     "test_strength.py::test_loraplus_gives_every_b_its_own_rate"),
    ("Trainer: checkpoints that resume", "test_trainer.py::test_resumed_training_has_equal_losses"),
    ("Trainer: checkpointing, accumulation, bf16, `torch_compile`",
     "test_trainer.py::test_options_of_the_trainer"),
    ("Trainer: `load_best_model_at_end`",
     "test_trainer.py::test_the_best_model_is_loaded_at_the_end"),
    ("TRL's `SFTTrainer`", "test_training_tools.py::test_sft_trainer"),
    ("accelerate, `accelerate launch`",
     "test_training_tools.py::test_accelerate_launch_on_two_processes"),
    ("DistributedDataParallel", "test_distributed.py::test_ddp_equals_one_process"),
    ("FSDP2", "test_distributed.py::test_fsdp2_trains_saves_and_merges_as_one_process"),
    ("DeepSpeed ZeRO 1 to 3 (run by hand)",
     "test_distributed.py::test_zero_stages_equal_one_process"),
    ("gradient checkpointing", PEFT + "test_gradients_are_the_same_with_checkpointing"),
    ("`torch.compile`", PEFT + "test_compiled"),
    ("diffusers: `load_lora_weights`",
     "test_diffusers.py::test_diffusers_reads_the_export_and_computes_the_same"),
    ("diffusers: `scale`, `set_adapters(weights=...)`",
     "test_strength.py::test_weights_and_scale_of_diffusers"),
    ("other adapters on the model are refused",
     PEFT + "test_other_adapters_on_the_model_are_refused"),
    ("a failed injection changes nothing",
     PEFT + "test_a_failed_injection_leaves_the_model_as_it_was"),
    ("two adapters active at once, `add_weighted_adapter`",
     "no: two ResLoRAs have no common chain; export each, and combine them as plain LoRA"),
    ("mixed batches (`adapter_names`)", "no: as above"),
    ("`nn.DataParallel`", "no: its replicas have no chain; refused by name"),
    ("LoRA-FA: `create_lorafa_optimizer`", "no: it needs a `scaling` of PEFT's own layers"),
    ("DoRA, aLoRA, QALoRA, BD-LoRA", "no: a tap has no form in them; refused by name"),
    ("PiSSA, OLoRA, CorDA, EVA, LoftQ, LoRA-GA",
     "no: they change the base weights or need data first; refused by name"),
    ("embeddings, convolutions, MultiheadAttention, expert parameters",
     "no: they do not see the same tokens in the next layer, or are not called"),
    ("hot swapping, X-LoRA, Arrow", "no: with an exported LoRA"),
    ("GPTQ, AWQ, AQLM, EETQ, HQQ bases", "not tested; any layer called as y = f(x) should do"),
)  # fmt: skip


def table() -> str:
    """Return the table."""
    lines = ["| of PEFT's LoRA | shown by, or why not |", "|---|---|"]
    for feature, test in FEATURES:
        lines.append(f"| {feature} | {f'`{test}`' if '::' in test else test} |")
    return "\n".join(lines)


def tests_of(name: str) -> set[str]:
    """Return the test functions of a file."""
    (file,) = TESTS.rglob(name)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def filled(text: str) -> str:
    """Return the guide with the table written anew."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
