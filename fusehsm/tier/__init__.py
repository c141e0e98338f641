"""The ready-made HSM: stores, the stubs that stand for what they hold, and whoever fills and empties them.

What the user calls:
tier/populate/command.py    `fusehsm populate`: stubs of everything in a store; tier/text.py tells how far it is
tier/fetch/command.py       `fusehsm fetch`: serves them, until told to end
tier/fetch/evict_command.py       `fusehsm evict`, `pin`, `unpin`: asks the running fetch
tier/fetch/status_command.py `fusehsm status PATH`: what of each file is here
tier/validate/command.py    `fusehsm validate`: is every byte the store's?

Stores:
tier/stores/base.py       what a store is: a tree, and ranges of files, each in one known version
opening.py     from what the user writes to the store that it means
tier/stores/local.py, tier/stores/archive.py, tier/stores/git.py, tier/stores/http.py, tier/stores/sftp.py, tier/stores/s3.py   kinds that tell much
tier/stores/fsspec.py  all others, as far as fsspec tells
tier/stores/s3.py lists of directories, asked for before their turn
tier/stores/s3.py   what botocore raises, in a line

Stubs:
tier/stubs/mark.py   how a stub is known: an attribute on the file
tier/stubs/record.py   what is kept on disk of a stub that has been filled: another one
tier/stubs/stub.py   one stub while it is served: content comes and goes, and its record is true at every moment
tier/stubs/writer.py, tier/stubs/residue.py   putting content there without making the file longer; what is where nothing should be
tier/populate/create.py    making stubs, one entry of a store after the other; tier/populate/ownership.py: their owners and modes
linux/beneath.py     opening what lies below a directory, without following links
tier/stubs/identity.py   which file it is, whatever its name
tier/stubs/extents.py, tier/stubs/extents.py, sizes.py, tier/stubs/identity.py   where a file has no data; numbers in a row; sizes and times as
people write them; which mount it is

Serving:
tier/fetch/destination.py the directory that is served, and where its events come from; tier/populate/lock.py: by one at a time
tier/fetch/handler.py     the handler: fills what an access is about to touch, or refuses it
tier/fetch/catalog.py     which file of the store, in which version, a stub stands for; tier/fetch/suspicion.py: whether its mark may be forged
tier/fetch/readahead.py     who reads from the beginning to the end, and what they will want next
tier/fetch/retry.py how long to go on asking a store that does not answer, and how fast
tier/fetch/durability.py     making what has been filled last
tier/fetch/access_list.py  lists of what a run has touched: --record, --prefetch
tier/fetch/evict.py    taking content away again; tier/fetch/inventory.py: what is here
tier/fetch/progress.py   what a terminal shows meanwhile
tier/fetch/server.py, tier/fetch/client.py, tier/fetch/protocol.py   the running fetch's control socket
tier/fetch/errors.py     errors that nobody expected, in a line
tier/fetch/sd_notify.py   telling systemd that it serves

Validating:
tier/validate/plan.py, tier/validate/trees.py    what to read; both trees, side by side
tier/validate/reader.py, tier/validate/worker.py processes that read, and may die of it
tier/validate/report.py                     what was found
"""
