"""What do PEFT and reslora cost under torch.compile, over the frozen chain (which is not compiled)?

Each in a compiler that knows nothing of those before it: beyond some number of recompiled models
torch would run the next one eagerly without a word.
"""

from __future__ import annotations

from functools import partial

import torch
from bench_layer import Case, Stack, with_peft, with_reslora
from session import Session
from speed import LAYERS, RANK, ends, made, reason_of, step_of, table

SHAPE = (8192, 4096, 4096)
BF16 = torch.bfloat16


def run(session: Session) -> None:
    """Time each compiled variant beside the frozen chain."""
    case = Case(*(session.size(n) for n in SHAPE), RANK, LAYERS)
    x, dy = ends(session, case)
    makers = {
        "peft p=0.05": partial(with_peft, case, 0.05),
        "peft p=0": partial(with_peft, case, 0.0),
        "reslora none p=0.05": partial(with_reslora, case, "none", 0.05),
        "reslora is p=0.05": partial(with_reslora, case, "is", 0.05),
    }
    for number, (name, make) in enumerate(makers.items()):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        frozen = step_of(made(session, partial(Stack, case), BF16), x, dy)
        model = made(session, make, BF16)
        try:
            call = torch.compile(model, backend="inductor" if session.is_cuda else "aot_eager")
            step = step_of(call, x, dy)
        except Exception as error:  # the compiler's are of many kinds
            session.record({"name": name, "failed": reason_of(error)})
            continue
        seconds = min(5.0, session.left() / (3 * (len(makers) - number)))
        rounds, results = table(session, {"frozen": frozen, name: step}, seconds)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        about = {"case": vars(case), "graphs": graphs, "graph_breaks": breaks, "rounds": rounds}
        session.record({"name": name, **about, "results": results})
        session.say(f"compiled {name}: {results[name]['ratio']['median']:.3f}, {graphs} graphs")
