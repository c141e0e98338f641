"""The kernel's general interfaces: system calls, /proc, mounts, signals. Nothing here knows of fanotify or of FUSE requests."""
