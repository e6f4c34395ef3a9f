"""One visit to a GPU: what can only be seen there, in at most ten minutes on one card.

    python -m benchmarks.gpu [--only NAME …] [--minutes 10] [--out DIRECTORY] [--tiny]

Each check has a name and figures with what is expected of them (catalog.py); one that fails, is stuck or takes the process with it
does not stop the others. gpu.json and gpu.md are written anew after every check, so that a visit that is cut off keeps what it
found. It needs this repository and its dependencies; peft, bitsandbytes, gguf and a second card add to it. On a lent machine that
lacks packages, carry their wheels (zarr, numcodecs, donfig, google-crc32c). Without a GPU it runs whole with tiny shapes, in about
a minute and a half, to test its own code.
"""
