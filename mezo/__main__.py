"""`python -m mezo`."""

from mezo.cli import app

app()
