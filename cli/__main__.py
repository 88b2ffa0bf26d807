"""`python -m lorasb_cli`."""

from .main import main

main()
