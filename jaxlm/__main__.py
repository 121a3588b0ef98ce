"""Runs the command line as `python -m jaxlm`."""

import sys

from jaxlm.cli import main

sys.exit(main())
