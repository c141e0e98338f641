"""The benchmark: fusehsm, the real kernel and bindfs side by side."""
