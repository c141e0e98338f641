"""The emulator: decides which groups are asked about an access, and applies their answers."""
