"""`python -m minilora`, the same as the command `minilora`."""

import sys

from minilora.cli import main

sys.exit(main())
