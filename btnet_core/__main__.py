"""`python -m btnet_core`: the same as the console script `btnet`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
