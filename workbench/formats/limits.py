"""Widths and sizes that the formats allow. Nothing here imports torch."""

MIN_BITS, MAX_BITS = 2, 8  # of group codes
DENSE_BITS = 16  # a dense matrix is bf16 on disk
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes has 4-bit kernels for
