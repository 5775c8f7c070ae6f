"""Runs the command line: `python -m reslora`."""

import sys

from .commands.cli import main

sys.exit(main())
