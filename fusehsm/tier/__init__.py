"""The ready-made HSM: stores, the stubs that stand for what they hold, and whoever fills and empties them.

What the user calls:
populate.py    `fusehsm populate`: stubs of everything in a store; progress.py tells how far it is
fetch.py       `fusehsm fetch`: serves them, until told to end
evict.py       `fusehsm evict`, `pin`, `unpin`: asks the running fetch
file_status.py `fusehsm status PATH`: what of each file is here
validate.py    `fusehsm validate`: is every byte the store's?

Stores:
store.py       what a store is: a tree, and ranges of files, each in one known version
opening.py     from what the user writes to the store that it means
local_store.py, archive_store.py, git_store.py, http_store.py, sftp_store.py, s3_store.py   kinds that tell much
fsspec_store.py  all others, as far as fsspec tells
lists_ahead.py lists of directories, asked for before their turn
s3_errors.py   what botocore raises, in a line

Stubs:
stub_mark.py   how a stub is known: an attribute on the file
residency.py   what is kept on disk of a stub that has been filled: another one
stub_file.py   one stub while it is served: content comes and goes, and its record is true at every moment
content_writer.py, residue.py   putting content there without making the file longer; what is where nothing should be
planting.py    making stubs, one entry of a store after the other; ownership.py: their owners and modes
linux/beneath.py     opening what lies below a directory, without following links
identity.py   which file it is, whatever its name
holes.py, runs.py, sizes.py, place.py   where a file has no data; numbers in a row; sizes and times as people write them; which mount it is

Serving:
destination.py the directory that is served, and where its events come from; alone.py: by one at a time
fetcher.py     the handler: fills what an access is about to touch, or refuses it
catalog.py     which file of the store, in which version, a stub stands for; suspicion.py: whether its mark may be forged
streams.py     who reads from the beginning to the end, and what they will want next
persistence.py how long to go on asking a store that does not answer, and how fast
keeping.py     making what has been filled last
touch_list.py  lists of what a run has touched: --record, --prefetch
evicting.py    taking content away again; inventory.py: what is here
fetch_progress.py   what a terminal shows meanwhile
fetch_server.py, fetch_client.py, fetch_protocol.py   the running fetch's control socket
mishaps.py     errors that nobody expected, in a line
service_manager.py   telling systemd that it serves

Validating:
validate_plan.py, validate_trees.py    what to read; both trees, side by side
validate_reader.py, validate_worker.py processes that read, and may die of it
validate_report.py                     what was found
"""
