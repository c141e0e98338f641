"""The process of a mount: its options, its control server, its handler, and its start as a child process."""
