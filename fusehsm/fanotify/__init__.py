"""The fanotify ABI and its rules: constants, layouts, argument checks, marks. No I/O and no event loop."""
