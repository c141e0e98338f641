"""`fusehsm populate` makes a stub for every file of a store."""
