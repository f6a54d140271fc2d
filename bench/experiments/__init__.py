"""Kernels that are not part of the product.

They stay here, with their tests in tests/bench/experiments, until they win a measured shape or the
worker needs them:

* `lora`: the products of perturbed LoRA factors, with z made inside of the products;
* `device_step`: the scalars of a step on the device, so that a CUDA graph can capture it;
* `attention`: attention of rows that share a prefix by the kernels of SGLang and of FlashInfer.
"""
