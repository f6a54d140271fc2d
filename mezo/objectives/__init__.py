"""What a step minimises: from scores of rows to a loss."""
