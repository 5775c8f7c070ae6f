"""Fine-tune a causal language model with ResLoRA, plain LoRA beside it; merge, export, read back.

    python finetune.py                                      # small model, made here; no download
    python finetune.py --model NAME_OR_FOLDER --data FILE   # any causal model of the Hub or on disk

A bad request is one sentence and exit code 2; Ctrl-C is one sentence and 130; 1 means that a file,
read back, does not agree with the model that wrote it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import options
from console import UserError


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit code."""
    try:
        chosen = options.parse(arguments)
        if chosen.model is None or Path(chosen.model).expanduser().is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to fetch, so nothing to ask
        # Threads that spin while they wait make a run on a busy machine several times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import job  # torch and transformers take seconds to import: only for a good request

        return job.run(chosen)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; a later run starts cleanly.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
