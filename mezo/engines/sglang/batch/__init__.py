"""What stands in for parts of SGLang while a scoring batch runs."""
