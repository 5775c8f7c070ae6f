"""What merging by a rule changes in the logits of a small language model."""

import torch

from reslora.injection.adapted import injection_of
from reslora.merging.planning import make_plan
from reslora.merging.stand_ins import plain_lora, standing_in


def ids(seed, rows=4, columns=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 30, (rows, columns), generator=generator)


def error_of(model, rule, batches):
    """The relative error of the logits where the shortcuts are merged by a rule."""
    injection = injection_of(model, "test")
    plan = make_plan(injection, rule, "test", use_affine=False)
    planned = list(zip(injection.layers, plan.layers, strict=True))
    square = norm = 0.0
    for batch in batches:
        wanted = model(input_ids=batch).logits
        with standing_in(planned, lambda layer, own: plain_lora(layer, own.A, own.B, 1.0)):
            got = model(input_ids=batch).logits
        square += float((got - wanted).square().sum())
        norm += float(wanted.square().sum())
    return (square / norm) ** 0.5
