"""The commands that show events, mounts and the machine's abilities: trace, status, doctor."""
