"""The training loop and what it leaves: progress, files, summary."""
