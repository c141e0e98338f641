"""A listener made of PyPI's pyfanotify: notifications only, as it refuses permission events; its group is read by a process that it forks.

pyfanotify_listener.py --style any --mark FLAGS MASK DIRECTORY DIRECTORY

Prints one line a file when the file "end" has been closed: equal events that wait together are merged, so when each came is not told.
"""

import logging
import select
import sys

import pyfanotify

EVENTS = (
    pyfanotify.FAN_OPEN
    | pyfanotify.FAN_ACCESS
    | pyfanotify.FAN_MODIFY
    | pyfanotify.FAN_CLOSE_WRITE
    | pyfanotify.FAN_CLOSE_NOWRITE
)


def main() -> None:
    directory = sys.argv[-1]
    fanotify = pyfanotify.Fanotify(log=logging.getLogger())
    fanotify.mark(directory, is_type="mp", ev_types=EVENTS)
    fanotify.start()
    client = pyfanotify.FanotifyClient(fanotify, path_pattern=f"{directory}/*")
    print("ready", flush=True)
    heard: dict[str, int] = {}
    while not heard.get("end", 0) & pyfanotify.FAN_CLOSE_NOWRITE:
        select.select([client.sock], [], [])
        for event in client.get_events():
            name = event.path[0].decode().rpartition("/")[2]
            heard[name] = heard.get(name, 0) | event.ev_types
    for name, events in heard.items():
        print("heard", name, pyfanotify.evt_to_str(events), flush=True)
    client.close()
    fanotify.stop()


if __name__ == "__main__":
    main()
