"""`python -m fedsim` is the command `fedsim`. May import: fedsim.cli."""

from fedsim.cli import main

if __name__ == "__main__":
    main()
