"""`fusehsm populate`: a stub for every file of a store."""
