"""`python -m patchkit.cli`."""

from patchkit.cli import main

main()
