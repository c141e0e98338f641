"""The benchmark: fusehsm compared with the real kernel and with bindfs."""
