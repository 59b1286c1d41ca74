"""``python -m policyskip``."""

from policyskip.cli import main

main()
