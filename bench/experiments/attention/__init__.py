"""Attention of rows that share a prefix by other people's kernels."""
