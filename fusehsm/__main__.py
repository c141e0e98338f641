"""`python -m fusehsm`: the same as the command `fusehsm`."""

import sys

from fusehsm.cli import main

if __name__ == "__main__":
    sys.exit(main())
