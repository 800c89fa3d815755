"""``python -m tvmstruct``: the command line."""

from tvmstruct.cli import main

main()
