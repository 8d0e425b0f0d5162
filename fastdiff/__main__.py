"""`python -m fastdiff`, and so `torchrun -m fastdiff`: the `fastdiff` command."""

from fastdiff.app.cli import main

main()
