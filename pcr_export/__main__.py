"""`python -m pcr_export` is `pcr-export`."""

from pcr_export.cli import main

main()
