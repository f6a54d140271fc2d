"""The two gates of a floating-point result against its float64 reference."""

import torch


def assert_close_to_reference(
    ours: torch.Tensor, same_dtype: torch.Tensor | None, reference: torch.Tensor, bound: float
) -> None:
    """Gate (a): max error <= bound, RMS <= bound / 2; gate (b): RMS <= 2x PyTorch's, same dtype.

    Gate (b) compares RMS errors because the largest of a few thousand is chance: over seeds, the
    ratio of two equally good sums' largest errors was seen between 0.3 and 3. Its floor is one ulp
    of the output's dtype at the reference's RMS, below which both are roundings. Without
    ``same_dtype``, for tensors of a few elements, there is only gate (a).
    """
    assert reference.dtype == torch.float64
    assert ours.isfinite().all()
    error = ours.double() - reference
    largest = float(error.abs().max())
    assert largest <= bound, f"max error {largest:.3g} > {bound:.3g}"
    assert _rms(error) <= bound / 2, f"RMS error {_rms(error):.3g} > {bound / 2:.3g}"
    if same_dtype is None:
        return
    ulp = torch.finfo(ours.dtype).eps * _rms(reference)
    limit = max(2 * _rms(same_dtype.double() - reference), ulp)
    assert _rms(error) <= limit, f"RMS error {_rms(error):.3g} > twice PyTorch's, {limit:.3g}"


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
