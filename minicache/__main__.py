"""`python -m minicache`, the form torchrun starts."""

if __name__ == "__main__":
    # first of all: `python -m` has put the working directory before the places of all other modules
    from minicache.interpreter import forget_working_directory

    forget_working_directory()
    from minicache.processes.signals import CommandLine

    with CommandLine():
        # takes a while, in which a signal ends the process without a traceback
        from minicache.cli import main

        main()
