"""`python -m hiprune_kernels` is the `hiprune` command."""

import sys

from .cli import main

sys.exit(main())
