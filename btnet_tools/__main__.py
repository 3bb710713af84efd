"""`python -m btnet_tools`: the same as the console script `btnet`."""

from btnet_tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
