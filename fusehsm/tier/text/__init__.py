"""Text that commands print and parse: progress lines and sizes."""
