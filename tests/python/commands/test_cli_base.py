"""export-lora and plot with --base: the rule 'weight' from files alone."""

import pytest
import safetensors.torch
import torch
from cli_samples import lora_of, make, run
from models import adapted, tiny_gpt2, tiny_llama

from reslora import export_lora, plots, save_pretrained

SHORTCUTS = [
    {"res_mode": "is"},
    {"res_mode": "ms", "pre_num": -1},
    {"res_mode": "ms", "pre_num": 2, "rank_pattern": {"v_proj": 4}},
]


def export(capsys, folder, *options, out="lora"):
    places = (folder / "adapter", folder / out, "--base", folder / "base")
    return run(capsys, "export-lora", *places, *options)


def assert_exported(folder, model):
    """The folder `lora` is what the model exports by `weight`, bit by bit."""
    export_lora(model, folder / "own", "weight")
    (got, config), (want, own) = lora_of(folder / "lora"), lora_of(folder / "own")
    assert got.keys() == want.keys() and all(torch.equal(got[k], t) for k, t in want.items())
    same = ("r", "lora_alpha", "fan_in_fan_out")
    assert {k: config[k] for k in same} == {k: own[k] for k in same}


@pytest.mark.parametrize("options", SHORTCUTS)
def test_an_export_by_weights_is_that_of_the_model(tmp_path, capsys, options):
    model = make(tmp_path, **options)
    code, out, err = export(capsys, tmp_path, "--method", "weight")
    assert (code, err) == (0, "") and "plain LoRA of rank" in out
    assert_exported(tmp_path, model)
    export_lora(model, tmp_path / "other", "input")
    other = lora_of(tmp_path / "other")[0]
    assert any(not torch.equal(t, other[k]) for k, t in lora_of(tmp_path / "lora")[0].items())


def test_weights_of_conv1d_and_of_shards_are_read(tmp_path, capsys):
    (tmp_path / "conv").mkdir()
    model = make(tmp_path / "conv", tiny_gpt2(), target_modules=["c_attn"])
    assert export(capsys, tmp_path / "conv", "--method", "weight")[0] == 0
    assert_exported(tmp_path / "conv", model)
    base = tiny_llama(initializer_range=0.2).bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    model = adapted(base, 0.2, target_modules=["q_proj", "v_proj"], res_mode="is")
    save_pretrained(model, tmp_path / "adapter")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert export(capsys, tmp_path, "--method", "weight")[0] == 0
    assert_exported(tmp_path, model)


def test_without_statistics_the_base_serves_and_this_is_told(tmp_path, capsys):
    model = make(tmp_path, statistics=False)
    code, _, err = export(capsys, tmp_path)
    assert code == 0 and err.count("\n") == 1 and "warning: no statistics" in err
    assert_exported(tmp_path, model)


def test_a_base_leaves_other_rules_as_they_are(tmp_path, capsys):
    model = make(tmp_path, fits=True)
    assert export(capsys, tmp_path)[::2] == (0, "")
    export_lora(model, tmp_path / "own")
    got, want = lora_of(tmp_path / "lora")[0], lora_of(tmp_path / "own")[0]
    assert all(torch.equal(got[k], t) for k, t in want.items())


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda base: None, "BASE must be a folder or a name of the Hub"),
        (lambda base: base.mkdir(), "must hold model.safetensors"),
        (lambda base: tiny_llama(4).save_pretrained(base), "must be that of the adapter"),
        (lambda base: tiny_gpt2().save_pretrained(base), "is this the base of the adapter"),
    ],
)
def test_a_base_that_cannot_serve_is_one_line(tmp_path, capsys, prepare, words):
    make(tmp_path)
    (tmp_path / "base").rename(tmp_path / "true")
    prepare(tmp_path / "base")
    code, out, err = export(capsys, tmp_path, "--method", "weight")
    assert (code, out, err.count("\n")) == (1, "", 1) and words in err
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "command",
    [["export-lora"], ["plot", "alpha"], ["plot", "singular-values"]],
    ids=lambda command: command[-1],
)
def test_the_missing_base_is_named_as_the_way_out(tmp_path, capsys, command):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    make(tmp_path, statistics=False)
    places = [tmp_path / "adapter", tmp_path / "out.png"]
    code, out, err = run(capsys, *command, *places, "--method", "weight")
    assert (code, out, err.count("\n")) == (1, "", 1) and "pass --base BASE" in err
    assert not places[1].exists()
    assert run(capsys, *command, *places, "--method", "weight", "--base", tmp_path / "base")[0] == 0
    assert places[1].exists()


def test_alphas_without_norms_are_by_weights(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    make(tmp_path, statistics=False)
    pictures = [tmp_path / "chosen.png", tmp_path / "own.png"]
    code, _, err = run(capsys, "plot", "alpha", tmp_path / "adapter", pictures[1])
    assert code == 1 and "pass --base BASE" in err
    for picture, options in zip(pictures, (["--method", "weight"], []), strict=True):
        places = (tmp_path / "adapter", picture, "--base", tmp_path / "base")
        code, out, err = run(capsys, "plot", "alpha", *places, *options)
        assert (code, out, err) == (0, f"{picture}\n", "")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_pictures_by_weights_are_those_of_the_model(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = make(tmp_path, res_mode="ms", pre_num=2)
    figures = {
        "alpha": plots.alphas(model, "weight"),
        "singular-values": plots.singular_values(model, "weight"),
    }
    others = {"alpha": plots.alphas(model), "singular-values": plots.singular_values(model)}
    for kind, figure in figures.items():
        picture = tmp_path / f"{kind}.png"
        places = (tmp_path / "adapter", picture, "--base", tmp_path / "base")
        code, out, err = run(capsys, "plot", kind, *places, "--method", "weight")
        assert (code, out, err) == (0, f"{picture}\n", "")
        for name, own in (("own", figure), ("other", others[kind])):
            own.savefig(tmp_path / f"{name}.png")
        assert picture.read_bytes() == (tmp_path / "own.png").read_bytes()
        assert picture.read_bytes() != (tmp_path / "other.png").read_bytes()


@pytest.mark.parametrize("kind", ["norms", "losses"])
def test_a_base_that_serves_nothing_is_refused(tmp_path, capsys, kind):
    make(tmp_path)
    places = (tmp_path / "adapter", tmp_path / "out.png", "--base", tmp_path / "base")
    code, _, err = run(capsys, "plot", kind, *places)
    assert code == 1 and f"got it for {kind}" in err and not (tmp_path / "out.png").exists()


def test_a_model_takes_no_base(tmp_path):
    model = make(tmp_path)
    with pytest.raises(ValueError, match="base is for an adapter's folder"):
        plots.alphas(model, "weight", base=tmp_path / "base")


def test_the_base_is_not_changed(tmp_path, capsys):
    make(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    assert export(capsys, tmp_path, "--method", "weight")[0] == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()} == before
    assert safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
