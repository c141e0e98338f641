"""The engines: carry FUSE requests to the gate, by pyfuse3 or from /dev/fuse directly."""
