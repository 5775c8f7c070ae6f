"""Names of the Hub wherever an adapter is taken: a cache laid out by hand, and no network."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cli_samples import LETTERS, run, write_tokenizer
from hub_samples import (
    BASE,
    FIRST,
    NAME,
    OPTIONS,
    SECOND,
    empty_cache,
    lay,
    refusal,
    serving,
    write_adapter,
    write_base,
)
from models import randomize, tiny_llama

import reslora
from reslora import ResLoraConfig, inject, load, merge_and_unload, plots, save_pretrained
from reslora.commands.check_export import check_export
from reslora.commands.inspect import inspect
from reslora.files.base_files import model_config
from reslora.files.exporting import export_folder, export_lora
from reslora.files.model_folder import merge_folder

RANKS = {1: 2, 2: 32}  # of plain LoRAs, by seed


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return empty_cache(tmp_path, monkeypatch)


def write_shortcuts(folder, seed):
    write_adapter(folder, seed, res_mode="ms", norm_window=4)


def write_lora(folder, seed):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANKS[seed], lora_alpha=3, target_modules=["q_proj", "v_proj"])
    randomize(peft.get_peft_model(tiny_llama(), config), 0.2).save_pretrained(folder)


def tensors_of(folder):
    (path,) = Path(folder).glob("*.safetensors")
    return safetensors.torch.load_file(path)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- What takes an adapter: each returns what it read, as values --------------------------------


def loaded(source, out, **place):
    torch.manual_seed(0)
    model = load(tiny_llama(), source, **place)
    return dict(model.state_dict())


def merged(source, out, **place):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(out / "base")
    merge_folder(out / "base", source, out / "merged", **place)
    return tensors_of(out / "merged")


def exported(source, out, **place):
    export_folder(source, out / "lora", **place)
    return tensors_of(out / "lora")


def inspected(source, out, **place):
    found = inspect(source, **place)
    assert found.path == str(Path(source, place.get("subfolder", "")))
    return found.chains


def drawn(source, out, **place):
    lines = plots.singular_values(source, **place).axes[0].lines
    return [list(line.get_ydata()) for line in lines]


def drawn_windows(source, out, **place):
    lines = plots.norm_windows(source, "product", **place).axes[0].lines
    return [list(line.get_ydata()) for line in lines]


def drawn_alphas(source, out, **place):
    return plots.alphas(source, **place).axes[0].images[0].get_array().tolist()


def checked(source, out, **place):
    return [str(finding) for finding in check_export(source, **place)]


def started(source, out, **place):
    """What init_from_lora takes over, at the rank that the LoRA has."""
    seed = 2 if "subfolder" in place or Path(source).name == "second" else 1
    model = inject(tiny_llama(), ResLoraConfig(**OPTIONS | {"r": RANKS[seed]}))
    reslora.init_from_lora(model, source, **place)
    return {key: t for key, t in model.state_dict().items() if "reslora" in key}


READERS = [
    (write_adapter, loaded),
    (write_adapter, merged),
    (write_adapter, exported),
    (write_adapter, inspected),
    (write_adapter, drawn),
    (write_shortcuts, drawn_windows),
    (write_shortcuts, drawn_alphas),
    (write_lora, checked),
    (write_lora, started),
    (write_lora, lambda source, out, **place: inspect(source, **place).parameters),
]


@pytest.mark.parametrize(("write", "read"), READERS)
def test_a_name_is_read_as_a_folder_is(cache, tmp_path, write, read):
    write(tmp_path / "first", 1)
    write(tmp_path / "second", 2)
    lay(cache, NAME, FIRST, tmp_path / "first", ["main"])
    lay(cache, NAME, SECOND, tmp_path / "second", ["v2"], below="some/where")
    wanted = [read(tmp_path / name, tmp_path / f"out-{name}") for name in ("first", "second")]
    assert not same(*wanted)
    assert same(read(NAME, tmp_path / "a"), wanted[0])
    assert same(read(NAME, tmp_path / "b", revision=FIRST), wanted[0])
    got = read(NAME, tmp_path / "c", revision="v2", subfolder="some/where")
    assert same(got, wanted[1])
    (tmp_path / "parent" / "second").parent.mkdir()
    (tmp_path / "second").rename(tmp_path / "parent" / "second")
    got = read(tmp_path / "parent", tmp_path / "d-second", subfolder="second")
    assert same(got, wanted[1])


def test_a_folder_wins_over_a_name(cache, tmp_path, monkeypatch):
    model = write_adapter(tmp_path / "user" / "adapter", 1)
    write_adapter(tmp_path / "other", 2)
    lay(cache, NAME, SECOND, tmp_path / "other", ["main"])
    with serving(monkeypatch, folder=tmp_path / "other") as server:
        got, want = load(tiny_llama(), NAME).state_dict(), model.state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want if "reslora" in key)
    assert not server.asked


def test_a_folder_of_a_base_wins_over_a_name(cache, tmp_path, monkeypatch):
    write_adapter(tmp_path / "adapter", 1, revision="v1")
    write_base(tmp_path / "other", 2)
    lay(cache, BASE, SECOND, tmp_path / "other", ["v1", "main"])
    base = load(write_base(tmp_path / BASE, 1), tmp_path / "adapter")
    with serving(monkeypatch, folder=tmp_path / "other") as server:
        merge_folder(BASE, tmp_path / "adapter", tmp_path / "out")
    assert_merged(tmp_path / "out", merge_and_unload(base).state_dict())
    assert not server.asked


def test_only_a_string_with_a_user_is_a_name(cache, tmp_path):
    write_adapter(tmp_path / "first", 1)
    lay(cache, NAME, FIRST, tmp_path / "first", ["main"])
    lay(cache, "adapter", FIRST, tmp_path / "first", ["main"])
    for path in (Path(NAME), "adapter", "a/" + NAME, "user/my adapter"):
        with pytest.raises(FileNotFoundError, match=r"folder must hold adapter_config\.json; got"):
            load(tiny_llama(), path)


@pytest.mark.parametrize("path", ["./typo", "../typo", ".typo/a", "/typo", "~/typo", "user/link"])
def test_what_can_only_be_a_path_is_not_asked_for(cache, tmp_path, monkeypatch, path):
    write_adapter(tmp_path / "first", 1)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/link").symlink_to("nowhere")
    with serving(monkeypatch, folder=tmp_path / "first") as server:
        with pytest.raises(FileNotFoundError) as caught:
            load(tiny_llama(), path)
        with pytest.raises(FileNotFoundError, match=r"^\[merge\] BASE must .* no such folder: "):
            merge_folder(path, tmp_path / "first", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=r"^\[base\] BASE must be .* no such folder: "):
            model_config(path)
    assert str(caught.value) == (
        f"[load] the adapter must be a folder or a name of the Hub; got no such folder: {path}"
    )
    assert not server.asked


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ({"revision": "v2"}, "a revision is of a name of the Hub; got 'v2' and "),
        ({"subfolder": "../first"}, "subfolder must be a path below the adapter; got '../first'"),
        ({"subfolder": "/first"}, "subfolder must be a path below the adapter; got '/first'"),
    ],
)
def test_places_that_mean_nothing_are_refused(cache, tmp_path, place, sentence):
    write_adapter(tmp_path / "first", 1)
    with pytest.raises(ValueError, match=sentence):
        load(tiny_llama(), tmp_path / "first", **place)


# ---- What cannot be had -------------------------------------------------------------------------


def test_without_network_and_cache_a_sentence_names_adapter_and_revision(cache):
    reason = " (it is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a folder)"
    assert refusal() == reason
    assert refusal(revision="v2") == f" at revision 'v2'{reason}"


def test_what_the_cache_lacks_is_told(cache, tmp_path):
    write_adapter(tmp_path / "first", 1)
    lay(cache, NAME, FIRST, tmp_path / "first", ["main"], below="some/where")
    assert refusal() == " (it holds no adapter_config.json, or only in a subfolder)"
    assert refusal(subfolder="some") == " (it holds no adapter_config.json in some)"
    assert "is not in the cache" in refusal(revision=SECOND)
    load(tiny_llama(), NAME, subfolder="some/where")
    (cache / "models--user--adapter/snapshots" / FIRST / "some/where/adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="must hold adapter_config"):
        load(tiny_llama(), NAME, subfolder="some/where")


def test_names_that_the_hub_cannot_have_are_refused(cache):
    assert "Cannot have -- or .." in refusal("a--b/c")


def test_without_huggingface_hub_names_are_refused(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"got user/adapter .*: pip install huggingface_hub"):
        load(tiny_llama(), NAME)


# ---- The revision of the base -------------------------------------------------------------------


def named(model):
    """Return a model that knows its name, as one that transformers loaded by it does."""
    model.config._name_or_path = BASE
    return model


def saved_by_us(model, folder, revision):
    model = inject(named(model), ResLoraConfig(**OPTIONS, revision=revision))
    save_pretrained(randomize(model), folder)
    again = named(write_base(folder / "again", 1))
    save_pretrained(load(again, folder), folder)  # it is kept


def saved_by_peft(model, folder, revision):
    model.name_or_path = BASE
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from reslora.peft import ResLoraConfig as PeftConfig

    randomize(peft.get_peft_model(model, PeftConfig(**OPTIONS), revision=revision)).save_pretrained(
        folder
    )


@pytest.fixture(params=[saved_by_us, saved_by_peft])
def bases(cache, tmp_path, request):
    """Lay two revisions of a base and an adapter of the older; return each, merged."""
    models = {ref: write_base(tmp_path / ref, seed) for ref, seed in (("v1", 1), ("main", 2))}
    lay(cache, BASE, FIRST, tmp_path / "v1", ["v1"])
    lay(cache, BASE, SECOND, tmp_path / "main", ["main"])
    request.param(write_base(tmp_path / "v1", 1), tmp_path / "adapter", "v1")
    assert revision_in(tmp_path / "adapter") == "v1"
    return {
        ref: merge_and_unload(load(model, tmp_path / "adapter")).state_dict()
        for ref, model in models.items()
    }


def assert_merged(folder, want):
    got = tensors_of(folder)
    assert all(torch.equal(got[key], want[key]) for key in got)


def test_a_merge_goes_into_the_revision_that_the_adapter_names(bases, tmp_path):
    merge_folder(BASE, tmp_path / "adapter", tmp_path / "out")
    assert_merged(tmp_path / "out", bases["v1"])
    merge_folder(BASE, tmp_path / "adapter", tmp_path / "other", base_revision="main")
    assert_merged(tmp_path / "other", bases["main"])
    merge_folder(tmp_path / "main", tmp_path / "adapter", tmp_path / "third")
    assert_merged(tmp_path / "third", bases["main"])
    with pytest.raises(ValueError, match="a revision is of a name of the Hub; got 'v1' and "):
        merge_folder(tmp_path / "v1", tmp_path / "adapter", tmp_path / "no", base_revision="v1")


def revision_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["revision"]


def test_an_export_names_the_revision_of_the_base(bases, tmp_path):
    export_folder(tmp_path / "adapter", tmp_path / "a")
    place = {"base": BASE, "base_revision": "main"}
    export_folder(tmp_path / "adapter", tmp_path / "b", **place)
    export_folder(tmp_path / "adapter", tmp_path / "c", base=tmp_path / "main")
    export_lora(named(load(tiny_llama(), tmp_path / "adapter")), tmp_path / "d")
    assert [revision_in(tmp_path / folder) for folder in "abcd"] == ["v1", "main", "v1", "v1"]
    write_adapter(tmp_path / "other", 1)
    export_folder(tmp_path / "other", tmp_path / "e", **place)
    export_folder(tmp_path / "other", tmp_path / "f")
    assert [revision_in(tmp_path / folder) for folder in "ef"] == ["main", None]


def names_in(folder):
    """Return what adapter_config.json says of base and task."""
    values = json.loads((folder / "adapter_config.json").read_text())
    return [values[key] for key in ("base_model_name_or_path", "revision", "task_type")]


def test_an_export_names_the_base_that_the_config_names_by_hand(cache, tmp_path):
    write_base(tmp_path / "base", 1)
    lay(cache, "user/other", FIRST, tmp_path / "base", ["v2"])
    write_adapter(tmp_path / "adapter", 1)  # its weights' header knows of no base
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"revision": "v2"}
    path.write_text(json.dumps(values))
    export_folder(tmp_path / "adapter", tmp_path / "a")
    assert names_in(tmp_path / "a") == [None, None, None]  # no revision of nothing
    by_hand = {"base_model_name_or_path": BASE, "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(values | by_hand))
    export_folder(tmp_path / "adapter", tmp_path / "b")
    export_folder(tmp_path / "adapter", tmp_path / "c", base=tmp_path / "base")
    export_folder(tmp_path / "adapter", tmp_path / "d", base="user/other")
    assert names_in(tmp_path / "b") == names_in(tmp_path / "c") == [BASE, "v2", "CAUSAL_LM"]
    assert names_in(tmp_path / "d") == ["user/other", "v2", "CAUSAL_LM"]
    path.write_text(json.dumps(values | {"task_type": 5}))
    with pytest.raises(ValueError, match=r"base_model_name_or_path and task_type must be strings"):
        export_folder(tmp_path / "adapter", tmp_path / "e")


def test_a_named_revision_that_is_not_there_is_refused(cache, tmp_path):
    write_base(tmp_path / "main", 2)
    lay(cache, BASE, SECOND, tmp_path / "main", ["main"])
    write_adapter(tmp_path / "adapter", 1, revision="v1")
    with pytest.raises(FileNotFoundError, match=r"got user/base at revision 'v1' \(it is not in"):
        merge_folder(BASE, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"names the revision: base_revision takes another"):
        merge_folder(BASE, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_adapter(tmp_path / "adapter", 1)
    merge_folder(BASE, tmp_path / "adapter", tmp_path / "out")


def test_a_base_may_have_no_user_and_must_be_had_or_a_folder(cache, tmp_path):
    write_base(tmp_path / "base", 1)
    lay(cache, "tiny", FIRST, tmp_path / "base", ["main"])
    write_adapter(tmp_path / "adapter", 1)
    merge_folder("tiny", tmp_path / "adapter", tmp_path / "out")
    base = load(write_base(tmp_path / "base", 1), tmp_path / "adapter")
    assert_merged(tmp_path / "out", merge_and_unload(base).state_dict())
    with pytest.raises(
        FileNotFoundError, match=r"BASE must be .*; got gpt \(it is not in the cache"
    ):
        merge_folder("gpt", tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(ValueError, match=r"\[merge\] BASE must be a folder or a name of the Hub"):
        merge_folder("a/b/c", tmp_path / "adapter", tmp_path / "other")


# ---- The command line ---------------------------------------------------------------------------


def lay_two(cache, tmp_path, write):
    """Lay an adapter of the default branch, and one of revision v2 in a folder below."""
    write(tmp_path / "first", 1)
    write(tmp_path / "second", 2)
    lay(cache, NAME, FIRST, tmp_path / "first", ["main"])
    lay(cache, NAME, SECOND, tmp_path / "second", ["v2"], below="some/where")


PLACE = ("--revision", "v2", "--subfolder", "some/where")
COMMANDS = [  # with SOURCE for the adapter; what is read of OUT, where the answer is not all
    (write_adapter, ("merge", "base", "SOURCE", "OUT"), tensors_of),
    (write_adapter, ("export-lora", "SOURCE", "OUT"), tensors_of),
    (write_adapter, ("inspect", "SOURCE"), None),
    (write_lora, ("check-export", "SOURCE"), None),
    (write_shortcuts, ("plot", "alpha", "SOURCE", "OUT.svg"), None),
    (write_shortcuts, ("plot", "norms", "SOURCE", "OUT.svg"), None),
    (write_shortcuts, ("plot", "singular-values", "SOURCE", "OUT.svg"), None),
]


@pytest.mark.parametrize(("write", "command", "read"), COMMANDS)
def test_commands_take_names_revisions_and_subfolders(
    cache, tmp_path, capsys, monkeypatch, write, command, read
):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", "one")  # equal pictures, equal files
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    lay_two(cache, tmp_path, write)
    tiny_llama().save_pretrained(tmp_path / "base")

    def answer(source, out, *options):
        names = {"SOURCE": source, "OUT": out, "OUT.svg": f"{out}.svg"}
        code, said, err = run(capsys, *(names.get(word, word) for word in command), *options)
        assert code == 0, err
        if read is not None:
            return read(out)
        if command[0] == "plot":
            return Path(f"{out}.svg").read_text()
        return said.replace(source, "").replace("some/where", "")

    wanted = [answer("first", "a"), answer("second", "b")]
    assert not same(*wanted)
    assert same(answer(NAME, "c"), wanted[0])
    got = answer(NAME, "d", *PLACE)
    assert same(got.replace("/:", ":") if isinstance(got, str) else got, wanted[1])


@pytest.mark.parametrize(("write", "command", "read"), COMMANDS)
def test_commands_end_in_a_sentence_without_network_and_cache(
    cache, tmp_path, capsys, write, command, read
):
    tiny_llama().save_pretrained(tmp_path / "base")
    words = [{"SOURCE": NAME}.get(word, word) for word in command]
    code, out, err = run(capsys, *words, "--revision", "v2")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"got {NAME} at revision 'v2' (it is not in the cache, and HF_HUB_OFFLINE" in err
    assert {path.name for path in tmp_path.iterdir()} <= {"base"}


def test_a_merge_is_verified_against_the_revision_that_it_went_into(bases, tmp_path, capsys):
    for ref, commit in (("v1", FIRST), ("main", SECOND)):
        write_tokenizer(tmp_path / "tokenizer")
        lay(tmp_path / "cache", BASE, commit, tmp_path / "tokenizer", [ref])
        write_tokenizer(tmp_path / ref)
    (tmp_path / "text").write_text(" ".join(LETTERS * 2))

    def verified(base, out, *options):
        options = (*options, "--json", "--verify", "text")
        code, said, err = run(capsys, "merge", base, "adapter", out, *options)
        assert code == 0, err
        return json.loads(said)["verify"]

    assert verified(BASE, "a") == verified("v1", "b") != verified("main", "c")
    assert verified(BASE, "d", "--base-revision", "main") == verified("main", "e")
    assert_merged(tmp_path / "a", bases["v1"])
    assert_merged(tmp_path / "d", bases["main"])


def test_exports_and_plots_read_the_revision_of_the_base_that_is_named(bases, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", 1, res_mode="is", revision="v1")

    def weighed(base, out, *options):
        options = ("--method", "weight", "--base", base, *options)
        assert run(capsys, "export-lora", "adapter", out, *options)[0] == 0
        assert run(capsys, "plot", "alpha", "adapter", f"{out}.svg", *options)[0] == 0
        return tensors_of(out)

    assert same(weighed(BASE, "a"), weighed("v1", "b"))
    assert same(weighed(BASE, "c", "--base-revision", "main"), weighed("main", "d"))
    assert not same(tensors_of("a"), tensors_of("c"))
    assert [revision_in(Path(folder)) for folder in "abcd"] == ["v1", None, "main", None]


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("plot losses state.json a.png --subfolder x", "--subfolder are of an adapter; got losses"),
        ("plot norms adapter a.png --base-revision v1", "is for alpha and singular-values; got it"),
        ("export-lora adapter out --base-revision v1", "needs a base; got 'v1' alone"),
        ("plot alpha adapter a.png --base-revision v1", "needs a base; got 'v1' alone"),
        ("export-lora adapter out --revision v1", "a revision is of a name of the Hub; got 'v1'"),
        ("inspect adapter --revision v1", "a revision is of a name of the Hub; got 'v1'"),
    ],
)
def test_options_that_mean_nothing_are_refused(cache, tmp_path, capsys, command, sentence):
    write_adapter(tmp_path / "adapter", 1)
    code, _, err = run(capsys, *command.split())
    assert code == 1 and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
