"""The Engine protocol and the engine that runs on plain transformers."""
