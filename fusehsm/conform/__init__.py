"""The comparison of the emulator with the real kernel: the same workloads run on both (`fusehsm conform`)."""
