"""Stubs on disk: the mark, the record of what is here, and one stub while it is served."""
