"""Run the command line as ``python -m policyskip``."""

from policyskip.cli import main

main()
