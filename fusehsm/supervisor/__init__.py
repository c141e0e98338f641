"""Runs unmodified listener programs: answers their fanotify system calls in the kernel's place (`fusehsm run`).

command.py     the command from start to end: signals, the exit code
options.py     the command line and its errors
mounts.py      the mounts
view.py        --listener: the command's view without the overlays, and its marks on them
launcher.py    the supervisor's end of launch.py
launch.py      makes the view, and starts the command under the filter (a program of its own)
filters.py     the BPF program for seccomp(2): which system calls the supervisor answers
notifier.py    receives those system calls and sends the answers (seccomp_unotify(2))
calls.py       does each system call, in a thread of its own
groups.py      a group as the processes of the command share it
sources.py     the events of one mount for a group
readiness.py   a group's descriptor in the command: readable while events wait, and a notice when its last copy is closed
placing.py     the descriptor numbers that groups get, and a line for groups that go elsewhere
delivery.py    events into a process: its descriptors, its memory
parked.py      calls that wait for events or for an answer, and the signals that end them
deadlocks.py   ends waits of the command for itself
own_accesses.py  ends waits of the supervisor for the command
mappings.py    mmap(2) of files on fusehsm mounts
tasks.py       the state of a thread, from /proc, and the memory of its process
lookup.py      a path as a process of the command sees it
numbers.py     system call numbers and constants, by architecture
"""
