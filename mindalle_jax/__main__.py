"""`python -m mindalle_jax` is `mindalle`."""

import sys

from mindalle_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
