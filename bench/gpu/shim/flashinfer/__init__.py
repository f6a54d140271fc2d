"""Stub: SGLang imports these names wherever there is a GPU, and uses them only if asked to."""

__version__ = "0.0.0+stub"


def missing(*arguments, **keywords):
    raise NotImplementedError(
        "flashinfer: only a stub is here; use attention_backend='triton' and "
        "sampling_backend='pytorch'."
    )


bmm_fp8 = missing
