"""`python -m coreinfer` is the command `coreinfer`."""

import sys

from .cli import main

sys.exit(main())
