"""The ready-made HSM: stores, the stubs that stand for what they hold, and the commands that fill and empty them.

populate/  `fusehsm populate`: stubs of everything in a store
fetch/     `fusehsm fetch`: serves stubs until told to end; `evict`, `pin`, `unpin` and `status PATH` ask a running fetch
validate/  `fusehsm validate`: is every byte the store's?
stores/    what a store is, and one module for each kind
stubs/     how a stub is known on disk, what is here of it, and one stub while it is served
text.py    progress lines, sizes and times as people write them
"""
