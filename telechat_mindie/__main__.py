"""`python -m telechat_mindie`."""

from telechat_mindie.cli import main

main()
