"""Low-bit codes and the compressed model on disk."""
