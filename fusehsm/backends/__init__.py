"""Where a listener's events come from: the real kernel, a fusehsm mount from any process, or the mount's own process."""
