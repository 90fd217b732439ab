"""`python -m taskvec`, for launchers that start modules."""

import sys

from taskvec.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
