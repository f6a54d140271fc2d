"""The cpu backend: slots written by the native module, products by BLAS."""

from bench.experiments.lora.call import LoraCall
from bench.experiments.lora.reference import through_slots


def perturbed_lora(call: LoraCall) -> None:
    """Write the result of a call."""
    through_slots(call, "cpu")
