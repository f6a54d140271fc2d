"""What SGLang needs to run on a host without a GPU."""
