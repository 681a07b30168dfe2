"""`python -m l0fast`: the command."""

import sys

from l0fast_command import main

if __name__ == "__main__":
    sys.exit(main())
