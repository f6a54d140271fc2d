"""What replaces parts of SGLang while a scoring batch runs."""
