"""Stubs on disk: the mark, the record of the blocks that are here, and one stub while it is served."""
