"""What carries FUSE requests to the gate: one module per FUSE library."""
