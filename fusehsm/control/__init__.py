"""The control socket of a mount: its language, and the ends of it that server and clients share."""
