"""`fusehsm fetch`: serve stubs from a store, and evict, pin and status, which ask a running fetch."""
