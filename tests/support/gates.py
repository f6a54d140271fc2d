"""The two gates of a floating-point result against its float64 truth."""

import torch


def assert_close_to_truth(
    ours: torch.Tensor, same_dtype: torch.Tensor | None, truth: torch.Tensor, bound: float
) -> None:
    """Gate (a): max error <= bound, RMS <= bound / 2; gate (b): RMS <= 2x PyTorch's, same dtype.

    Gate (b) compares RMS errors because the largest of a few thousand is chance: over seeds, the
    ratio of two equally good sums' largest errors was seen between 0.3 and 3. Its floor is one ulp
    of the output's dtype at the truth's RMS, below which both are roundings. Without
    ``same_dtype``, for tensors of a few elements, there is gate (a) alone.
    """
    assert truth.dtype == torch.float64
    assert ours.isfinite().all()
    error = ours.double() - truth
    largest = float(error.abs().max())
    assert largest <= bound, f"max error {largest:.3g} > {bound:.3g}"
    assert _rms(error) <= bound / 2, f"RMS error {_rms(error):.3g} > {bound / 2:.3g}"
    if same_dtype is None:
        return
    ulp = torch.finfo(ours.dtype).eps * _rms(truth)
    limit = max(2 * _rms(same_dtype.double() - truth), ulp)
    assert _rms(error) <= limit, f"RMS error {_rms(error):.3g} > twice PyTorch's, {limit:.3g}"


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
