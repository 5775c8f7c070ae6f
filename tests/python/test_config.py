"""ResLoraConfig: defaults, refusals, JSON."""

import dataclasses
import inspect
import json

import pytest

from reslora import _C, ResLoraConfig
from reslora.config import PYTHON_ONLY

# What C++ says that an option must be, as the type of a dataclass's field.
TYPES = {
    "be a whole number": "int",
    "be a number": "float",
    "be true or false": "bool",
    "be a string": "str",
    "be layer indices": "int | list[int] | None",
    "be a name or a list of names": "str | list[str] | None",
    "be a list of names or a regular expression": "str | list[str] | None",
    "map expressions to whole numbers": "dict[str, int]",
    "map expressions to numbers": "dict[str, float]",
    "be true, false or 'gaussian'": "bool | str",
}


def default_of(option):
    is_made = option.default is dataclasses.MISSING
    return option.default_factory() if is_made else option.default


@pytest.mark.parametrize("with_peft", [False, True])
def test_options_agree_with_cpp_in_name_type_and_default(with_peft):
    kind = pytest.importorskip("reslora.peft").ResLoraConfig if with_peft else ResLoraConfig
    ours = {option.name: option for option in dataclasses.fields(kind)}
    listed = {option.name for option in dataclasses.fields(ResLoraConfig)}
    assert listed == {option.name for option in _C.options()} | set(PYTHON_ONLY)
    for option in _C.options():
        default = json.loads(option.default_json)
        wanted = TYPES[option.kind]
        if default is None and "None" not in wanted:
            wanted += " | None"
        assert ours[option.name].type == wanted, option.name
        assert default_of(ours[option.name]) == default, option.name


def test_defaults_of_what_only_python_knows():
    config = ResLoraConfig()
    assert {name: getattr(config, name) for name in PYTHON_ONLY} == {
        "bias": "none", "finish_at": None, "revision": None, "finished_from": None,
        "finished_step": None,
    }  # fmt: skip


def test_every_option_has_a_help_text():
    for option in dataclasses.fields(ResLoraConfig):
        assert option.metadata["help"].endswith("."), option.name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "r must be at least 1; got 0"),
        ({"r": 2.5}, "r must be a whole number; got 2.5"),
        ({"r": True}, "r must be a whole number; got true"),
        ({"lora_alpha": 0}, "lora_alpha must be finite and greater than 0; got 0"),
        (
            {"lora_alpha": float("nan")},
            "lora_alpha must be a number; got nan",
        ),
        ({"lora_alpha": "8"}, 'lora_alpha must be a number; got "8"'),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\); got 1"),
        ({"res_mode": "residual"}, "res_mode must be .*; got 'residual'"),
        ({"res_mode": None}, "res_mode must be a string; got null"),
        ({"r": 4j}, r"r must be a whole number; got 4j"),
        ({"rank_pattern": {1: 2}}, r"the keys of rank_pattern must be strings; got \{1: 2\}"),
        ({"layers_pattern": [""], "layers_to_transform": 1}, "layers_pattern must be names"),
        ({"pre_num": -2}, "pre_num must be .*; got -2"),
        ({"revision": 1}, "revision must be a string; got 1"),
        ({"first_block": "triple"}, "first_block must be .*; got 'triple'"),
        ({"norm_window": -1}, "norm_window must be .*; got -1"),
        ({"norm_window": 2**45}, "norm_window must be .*at most 131072; got 35184372088832"),
        ({"detach_taps": 1}, "detach_taps must be true or false; got 1"),
        ({"bias": "all"}, "bias must be 'none' .*; got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be .*; got 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights must be .*; got 1"),
        ({"merge_method": "best"}, "merge_method must be .*; got 'best'"),
        ({"finished_from": "bs"}, "finished_from must be 'is', 'ms' or None; got 'bs'"),
        ({"finished_step": -1}, "finished_step must be a number of steps; got -1"),
        ({"target_modules": 3}, "target_modules must be .*; got 3"),
        ({"target_modules": [""]}, "target_modules must be"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": "q_(proj"}, r"must be a regular expression; got 'q_\(proj'"),
        ({"rank_pattern": {"(": 4}}, r"must be a regular expression; got '\('"),
        ({"modules_to_save": 3}, "modules_to_save must be a name or a list"),
        (
            {"modules_to_save": object()},
            "modules_to_save must be a name or a list of names; got <object",
        ),
        ({"layers_to_transform": []}, "layers_to_transform must be layer indices"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be layer indices"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, "layers_to_transform needs"),
        ({"layers_pattern": 1, "layers_to_transform": 1}, "layers_pattern must be a name"),
        ({"layers_pattern": "layers"}, "layers_pattern says which number"),
        ({"rank_pattern": {"q": 0}}, "r must be at least 1; got 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern must map expressions to whole numbers"),
        ({"rank_pattern": ["q"]}, "rank_pattern must map expressions"),
        ({"alpha_pattern": {"q": -1}}, "lora_alpha must be finite"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern must map expressions to numbers"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        ResLoraConfig(**options)
    assert "\n" not in str(caught.value)


def test_json_round_trip(tmp_path):
    config = ResLoraConfig(
        r=4, target_modules=["q", "v"], rank_pattern={"q": 2}, res_mode="ms", pre_num=-1
    )
    config.save(tmp_path / "adapter_config.json")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "RESLORA" and values["res_mode"] == "ms"
    assert ResLoraConfig.load(tmp_path / "adapter_config.json") == config
    assert ResLoraConfig.from_dict(config.to_dict()) == config
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


def test_patterns_keep_their_order_in_files():
    config = ResLoraConfig(rank_pattern={"z": 2, "a": 3}, alpha_pattern={"z": 2, "a": 3})
    read = ResLoraConfig.from_json(config.to_json())
    assert list(read.rank_pattern) == list(read.alpha_pattern) == ["z", "a"]


def test_files_name_what_only_python_knows_where_it_is_not_the_default():
    assert not set(PYTHON_ONLY) & set(json.loads(ResLoraConfig().to_json()))
    assert json.loads(ResLoraConfig(finish_at=0.5, revision="x").to_json())["finish_at"] == 0.5


def test_unknown_keys_warn_and_known_file_keys_do_not(recwarn):
    ResLoraConfig.from_dict({"r": 4, "peft_type": "RESLORA", "base_model_name_or_path": None})
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"unknown options are ignored: \['future'\]"):
        assert ResLoraConfig.from_dict({"r": 4, "future": 1}).r == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object; got list"),
        ('{"peft_type": "LORA"}', "peft_type must be 'RESLORA'; got 'LORA'"),
        ('{"peft_type": 3}', "peft_type must be 'RESLORA'; got '3'"),
        ("\ufeff{}", "must be UTF-8 without a byte-order mark"),
        ('{"r": "8"}', 'r must be a whole number; got "8"'),
    ],
)
def test_bad_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "adapter_config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        ResLoraConfig.load(path)


def test_sets_and_tuples_of_names_become_lists():
    assert ResLoraConfig(target_modules=("v", "q")).target_modules == ["v", "q"]
    assert ResLoraConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]
    assert ResLoraConfig(layers_pattern="h", layers_to_transform=1).layers_pattern == ["h"]
    assert ResLoraConfig(rank_pattern=None, merge_method="") == ResLoraConfig()
    assert ResLoraConfig(modules_to_save="head").modules_to_save == ["head"]


def test_options_of_lora_may_be_there_where_they_are_off():
    config = ResLoraConfig(use_dora=False, loftq_config={}, layer_replication=None, r=3)
    assert config == ResLoraConfig(r=3)
    assert ResLoraConfig(megatron_core="megatron.core", qalora_group_size=16) == ResLoraConfig()
    assert list(inspect.signature(ResLoraConfig).parameters)[:2] == ["r", "lora_alpha"]
    with pytest.raises(ValueError, match="use_dora must be off"):
        ResLoraConfig(use_dora=True)
