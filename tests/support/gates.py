"""The two gates of a floating-point result against its float64 truth."""

import torch


def assert_close_to_truth(
    ours: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, bound: float
) -> None:
    """Gate (a): max error <= bound, RMS <= bound / 2; gate (b): <= 2x PyTorch's error, same dtype.

    Gate (b) has a floor of one ulp of the output's dtype at the truth's largest magnitude, below
    which both are roundings.
    """
    assert truth.dtype == torch.float64
    assert ours.isfinite().all()
    error = (ours.double() - truth).abs()
    theirs = (same_dtype.double() - truth).abs()
    ulp = torch.finfo(ours.dtype).eps * float(truth.abs().max())
    largest, rms = float(error.max()), float(error.square().mean().sqrt())
    assert largest <= bound, f"max error {largest:.3g} > {bound:.3g}"
    assert rms <= bound / 2, f"RMS error {rms:.3g} > {bound / 2:.3g}"
    limit = max(2 * float(theirs.max()), ulp)
    assert largest <= limit, f"max error {largest:.3g} > twice that of PyTorch, {limit:.3g}"
