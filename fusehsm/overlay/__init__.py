"""A plain POSIX overlay over the backing directory. It knows nothing of events."""
