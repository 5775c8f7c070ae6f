"""ResLoRA as a method of PEFT: `get_peft_model`, Trainer, TRL and what else knows PEFT models.

Example::

    from peft import get_peft_model
    from reslora.peft import ResLoraConfig  # importing this registers the method

    config = ResLoraConfig(r=8, target_modules=["q_proj", "v_proj"], res_mode="is")
    model = get_peft_model(model, config)
    ...  # train, save_pretrained, PeftModel.from_pretrained, as with LoRA
    model = model.merge_and_unload()

PEFT finds the layers, wraps them and writes the files. What a layer computes, how layers are
linked and how they are merged is the package's own: every function of `reslora` (print_links,
calibrate, merge_report, merge, export_lora, finish, ...) takes a PEFT model as it takes an
injected one. One adapter is active at a time. Needs peft 0.18 or newer.
"""

from .config import ResLoraConfig
from .hooks import add_to_peft
from .layer import Adapter, PeftLinear
from .model import ResLoraModel

add_to_peft()

__all__ = ["Adapter", "PeftLinear", "ResLoraConfig", "ResLoraModel"]
