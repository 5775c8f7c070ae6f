"""Runs the command line: `python -m reslora`."""

import sys

from .cli import main

sys.exit(main())
