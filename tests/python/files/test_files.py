"""Files through the extension: interop with the safetensors package, and the checksum's definition.

What the reader and the writer refuse is tested in C++ (safetensors_test, adapter_io_test); here is
what needs another implementation to compare with.
"""

import hashlib
import json
import os
import stat
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reslora import _C

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (1,), (2, 3), (1, 3, 1, 2)]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(bits(got[name]), bits(tensor)), name


def every_dtype():
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}.{shape}": (torch.rand(shape, generator=generator) * 7 - 1).abs().to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def test_the_safetensors_package_reads_our_files(tmp_path):
    tensors = every_dtype()
    metadata = {"format": "pt", "text": 'é\n"\\\x00€😀', "": ""}
    path = tmp_path / "ours.safetensors"
    _C.save_tensors(str(path), tensors, metadata)
    assert_same(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata


def test_we_read_files_of_the_safetensors_package(tmp_path):
    tensors = every_dtype() | {"empty": torch.empty(0, 3)}
    metadata = {"format": "pt", "text": 'é\n"\\€😀'}
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    got, got_metadata = _C.load_tensors(str(path))
    assert_same(got, tensors)
    assert got_metadata == metadata


def test_a_file_of_one_dtype_has_the_bytes_of_the_safetensors_package(tmp_path):
    tensors = {name: torch.full((2, 3), i + 1.0) for i, name in enumerate("cab")}
    _C.save_tensors(str(tmp_path / "ours"), tensors, {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=4)),
        min_size=1,  # safetensors 0.8 writes a malformed header for no tensors and no metadata
        max_size=6,
    ),
    st.dictionaries(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=20)] * 2),
)
def test_any_names_shapes_and_metadata_travel_both_ways(tmp_path, entries, metadata):
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in entries.items()}
    path = str(tmp_path / "file")
    _C.save_tensors(path, tensors, metadata)
    assert_same(safetensors.torch.load_file(path), tensors)
    safetensors.torch.save_file(tensors, path, metadata)
    assert_same(_C.load_tensors(path)[0], tensors)


def mutations():
    """Headers on whose validity the two readers must agree, most of them malformed."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    yield {"a": entry}, 8
    yield {"a": entry}, 9
    yield {"a": entry}, 7
    yield {"a": entry | {"shape": [3]}}, 8
    yield {"a": entry | {"dtype": "F16"}}, 8
    yield {"a": entry | {"dtype": "F99"}}, 8
    yield {"a": entry | {"data_offsets": [1, 9]}}, 9
    yield {"a": entry | {"data_offsets": [8, 0]}}, 8
    yield {"a": entry | {"shape": [2**32, 2**32]}}, 8
    yield {"a": entry | {"shape": [-2]}}, 8
    yield {"a": entry | {"shape": [2.0]}}, 8
    yield {"a": entry, "b": entry}, 8
    yield {"a": entry, "b": entry | {"data_offsets": [8, 16]}}, 16
    yield {"a": entry, "b": entry | {"data_offsets": [12, 20]}}, 20
    yield {"a": entry, "b": {"dtype": "I8", "shape": [0], "data_offsets": [8, 8]}}, 8
    yield {"a": entry, "__metadata__": {"k": 1}}, 8
    yield {"a": entry, "__metadata__": {"k": "v"}}, 8
    yield {"a": {"dtype": "F32", "shape": [2]}}, 8
    yield {"a": 1}, 0
    yield [], 0
    yield {}, 0


@pytest.mark.parametrize(("header", "size"), list(mutations()))
def test_both_readers_agree_on_what_is_a_file(tmp_path, header, size):
    text = json.dumps(header).encode()
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    try:
        wanted = safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        with pytest.raises(ValueError, match=r"^\[load_tensors\]"):
            _C.load_tensors(str(path))
    else:
        assert_same(_C.load_tensors(str(path))[0], wanted)


def test_errors_of_the_system_are_no_value_errors(tmp_path):
    with pytest.raises(RuntimeError, match="No such file") as caught:
        _C.load_tensors(str(tmp_path / "none"))
    assert not isinstance(caught.value, ValueError)
    with pytest.raises(RuntimeError, match="No such file") as caught:
        _C.save_tensors(str(tmp_path / "none" / "file"), {}, {})
    assert not isinstance(caught.value, ValueError)


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_stage_puts_all_in_place_or_nothing(tmp_path, is_whole):
    out = tmp_path / "out"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), _C.Stage(out, is_whole=is_whole) as stage:
            _C.write_text(stage.path("a"), "half")
            raise error
        assert list(tmp_path.iterdir()) == []
    with _C.Stage(out, is_whole=is_whole) as stage:
        _C.write_text(stage.place / "b" if is_whole else stage.path("b"), "\u00e9")
        assert not (out / "b").exists()
    assert (out / "b").read_text(encoding="utf-8") == "\u00e9"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "b"]


def test_what_the_system_refuses_to_a_stage_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"^\[save\] .*no file can be made in its folder"):
        _C.write_text(tmp_path / "none" / "file", "")
    with pytest.raises(OSError, match="the folder could not be made"):
        _C.Stage(tmp_path / "none" / "out", is_whole=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="could not be put in place"):
        with _C.Stage(tmp_path / "out", is_whole=True):
            (tmp_path / "out" / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    with pytest.raises(ValueError, match="below a file"):
        _C.Stage(tmp_path / "out" / "mine" / "below")


def test_empty_tensors_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="'w' must not be empty"):
        _C.save_tensors(str(tmp_path / "file"), {"w": torch.empty(0)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "file"
    old = os.umask(0o022)
    try:
        _C.save_tensors(str(path), {"w": torch.ones(1)}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


CONFIG = '{"r": 2, "res_mode": "is"}'
LAYERS = [_C.LayerShape("l.0.q", 4, 3, 2, 0.1), _C.LayerShape("l.1.q", 4, 3, 1, 2.0)]
CHAINS = [("q", LAYERS), ("v", [_C.LayerShape("v", 5, 6, 2, 1e-30)])]


def adapter_tensors():
    tensors = {"score.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    for _, layers in CHAINS:
        for x in layers:
            tensors[f"{x.name}.reslora_A.weight"] = torch.randn(x.r, x.in_features)
            tensors[f"{x.name}.reslora_B.weight"] = torch.randn(x.out_features, x.r)
    return tensors


@pytest.fixture
def adapter(tmp_path):
    path = str(tmp_path / "adapter_model.safetensors")
    _C.save_adapter(path, CONFIG, CHAINS, adapter_tensors())
    return path


PREFIX = "base_model.model."


def without_prefix(tensors):
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def checksum(config, chains, tensors):
    """The sum of reslora.sha256, written a second time from its definition in adapter_io.h."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    total = hashlib.sha256()

    def add(text):
        total.update(f"{len(text.encode())}:{text}".encode())

    add(config)
    add(chains)
    for name in sorted(tensors):
        add(name)
        add(names[tensors[name].dtype])
        add(",".join(map(str, tensors[name].shape)))
        total.update(bits(tensors[name]).numpy().tobytes())
    return total.hexdigest()


def test_an_adapter_round_trips(adapter):
    got = _C.load_adapter(adapter)
    tensors, metadata = _C.load_tensors(adapter)
    assert got.config_json == CONFIG
    assert got.chains == CHAINS
    assert all(name.startswith(PREFIX) for name in tensors)  # as PEFT names them
    own = without_prefix(tensors)
    assert_same(got.tensors, own)
    assert metadata["format"] == "pt"
    assert metadata["reslora.format"] == "1"
    assert metadata["reslora.sha256"] == checksum(CONFIG, metadata["reslora.chains"], own)


def test_an_adapter_survives_being_rewritten_by_the_safetensors_package(adapter):
    tensors, metadata = _C.load_tensors(adapter)
    safetensors.torch.save_file(tensors, adapter, metadata)
    assert_same(_C.load_adapter(adapter).tensors, without_prefix(tensors))


def test_an_adapter_without_the_prefix_of_peft_is_read(adapter):
    tensors, metadata = _C.load_tensors(adapter)
    own = without_prefix(tensors)
    safetensors.torch.save_file(own, adapter, metadata)
    assert_same(_C.load_adapter(adapter).tensors, own)


def test_a_plain_lora_file_is_not_an_adapter_of_ours(tmp_path):
    path = tmp_path / "file"
    safetensors.torch.save_file({"x.lora_A.weight": torch.ones(1, 2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"PeftModel\.from_pretrained"):
        _C.load_adapter(str(path))


def spoiled_chains():
    layer = {"name": "v", "in": 5, "out": 6, "r": 2, "scaling": 1.0}
    yield [{"name": "v", "layers": [layer]}], None
    yield [{"name": "v", "layers": [layer | {"in": 4}]}], "as the chains say"
    yield [{"name": "v", "layers": [layer | {"r": 0}]}], "r >= 1"
    yield [{"name": "v", "layers": [layer | {"r": 2.0}]}], "integer"
    yield [{"name": "v", "layers": [layer | {"extra": 1}]}], "'extra'"
    yield [{"name": "v", "layers": [{"name": "v"}]}], "got 1 of them"
    yield [{"name": "v", "layers": [layer, layer]}], "once"
    yield [{"name": "v", "layers": [layer]}, {"name": "v", "layers": [layer]}], "'v' twice"
    yield [{"name": "v", "layers": []}], "must have a layer"
    yield [{"layers": [layer]}], "got 1 of them"
    yield [{"name": "v", "layers": [layer | {"name": "w"}]}], "missing"
    yield [], "must have a chain"
    yield {}, "an array"


@pytest.mark.parametrize(("chains", "rule"), list(spoiled_chains()))
def test_chains_are_checked_even_where_the_checksum_is_right(tmp_path, chains, rule):
    path = str(tmp_path / "file")
    tensors = {"v.reslora_A.weight": torch.ones(2, 5), "v.reslora_B.weight": torch.ones(6, 2)}
    text = json.dumps(chains)
    sums = {"reslora.config": CONFIG, "reslora.chains": text, "reslora.format": "1"}
    sums["reslora.sha256"] = checksum(CONFIG, text, tensors)
    safetensors.torch.save_file(tensors, path, sums)
    if rule is None:
        assert _C.load_adapter(path).config_json == CONFIG
        return
    with pytest.raises(ValueError, match=rf"^\[load_adapter\].*{rule}"):
        _C.load_adapter(path)
