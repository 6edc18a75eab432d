"""Compression Workbench: look into a language model, pick where it may compute less, run it, trust the numbers."""
