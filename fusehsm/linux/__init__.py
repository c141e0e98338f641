"""What the kernel offers to any program: system calls, /proc, mounts, signals. Nothing here knows of fanotify or of FUSE requests."""
