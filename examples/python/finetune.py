"""Fine-tune a causal language model with ResLoRA, plain LoRA beside it; merge, export, read back.

    python finetune.py                                      # small model, made here; no download
    python finetune.py --model NAME_OR_FOLDER --data FILE   # any causal model of the Hub or on disk

A bad request, or no room for a file, is one sentence and exit code 2; Ctrl-C is one sentence and
130; 1 means that a file, read back, does not agree with the model that wrote it. The results appear
in --output when all of them are there.
"""

from __future__ import annotations

import sys

try:
    import interrupts
except KeyboardInterrupt:  # this early its handler is not there yet
    print("\nquickstart: interrupted", file=sys.stderr)
    sys.exit(130)


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit code."""
    interrupts.watch("quickstart")
    import console  # from here on Ctrl-C is a sentence, so what takes time is imported here

    try:
        return _run(arguments)
    except console.UserError as error:
        sentence: str | None = str(error)
    except Exception as error:
        sentence = console.refused_by_system(error)
        if sentence is None:
            raise
    print(f"quickstart: {sentence}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    import os
    from pathlib import Path

    import options
    import places

    until = None
    if arguments[:1] == ["--check"]:  # quickstart.sh asks, before torch is installed
        _, until, *arguments = arguments
    chosen = options.parse(arguments)
    if until == "options":
        return 0
    if chosen.model is None or Path(chosen.model).expanduser().is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to fetch, so nothing to ask
    # Threads that spin while they wait make a run on a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with places.results(chosen) as stage:
        if until == "places":
            return 0
        import job  # torch and transformers take seconds to import: only for a good request

        return job.run(chosen, stage)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
