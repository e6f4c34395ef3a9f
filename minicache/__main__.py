"""`python -m minicache`, the form torchrun starts."""

from minicache.cli import main

if __name__ == "__main__":
    main()
