"""`python -m minicache`, the form torchrun starts."""

from minicache.processes.signals import CommandLine

if __name__ == "__main__":
    with CommandLine():
        # takes a while, in which a signal ends the process without a traceback
        from minicache.cli import main

        main()
