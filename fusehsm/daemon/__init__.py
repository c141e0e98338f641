"""The process of a mount: its options, its control server, its handler, and starting it as a child."""
