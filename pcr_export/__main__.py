"""`python -m pcr_export` is `pcr-export`."""

from pcr_export.start import main

main()
