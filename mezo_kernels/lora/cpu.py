"""The cpu backend: slots written by the native module, products by BLAS."""

from mezo_kernels.lora.call import LoraCall
from mezo_kernels.lora.reference import through_slots


def perturbed_lora(call: LoraCall) -> None:
    """Write the result of a call."""
    through_slots(call, "cpu")
