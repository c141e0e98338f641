"""The emulator held against the real kernel: the same workloads on both, event streams compared (`fusehsm conform`)."""
