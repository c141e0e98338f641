"""The sources of a listener's events: the real kernel, a fusehsm mount from any process, or the mount's own process."""
