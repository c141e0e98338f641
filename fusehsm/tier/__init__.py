"""The ready-made HSM: stores, the stubs of their files, and the commands that fill and empty stubs.

populate/  `fusehsm populate`: makes stubs of all files in a store
fetch/     `fusehsm fetch`: serves stubs until a signal ends it; `evict`, `pin`, `unpin` and `status PATH` ask a running fetch
validate/  `fusehsm validate`: checks that the bytes are the store's
stores/    the interface of a store, and one module for each kind
stubs/     the mark and the record of a stub on disk, and one stub while it is served
text.py    progress lines; sizes and times as text
"""
