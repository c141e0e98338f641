"""Which groups are asked about an access, and what follows from the answers."""
