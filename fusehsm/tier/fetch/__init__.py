"""`fusehsm fetch` serves stubs from a store; `evict`, `pin` and `status` ask a running fetch."""
