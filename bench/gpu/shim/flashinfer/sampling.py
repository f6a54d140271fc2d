"""Stub, see the package."""

from flashinfer import missing

min_p_sampling_from_probs = missing
top_k_top_p_sampling_from_probs = missing
