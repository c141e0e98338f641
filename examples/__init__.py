"""Programs that use fusehsm: a mirror handler and the demonstration that runs on it."""
