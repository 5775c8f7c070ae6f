"""Finding an adapter's layers among the files of a base model."""

from contextlib import nullcontext

import pytest
from models import adapted, tiny_llama

from reslora import save_pretrained
from reslora.files.model_folder import merge_folder


@pytest.mark.parametrize(
    ("targets", "is_refused"),
    [
        (["q_proj", "v_proj"], True),
        ("all-linear", True),
        (r".*\.(q_proj|v_proj)", True),
        (r".*layers\.[01]\.self_attn\.(q_proj|v_proj)", False),
    ],
)
def test_a_base_with_more_layers_than_the_adapter_is_refused(tmp_path, targets, is_refused):
    save_pretrained(adapted(tiny_llama(2), target_modules=targets), tmp_path / "adapter")
    tiny_llama(3).save_pretrained(tmp_path / "base")
    places = [tmp_path / name for name in ("base", "adapter", "out")]
    expected = pytest.raises(ValueError, match="must be that of the adapter; got 3 layers")
    with expected if is_refused else nullcontext():
        merge_folder(*places, "weight")
    assert places[2].exists() == (not is_refused)
