"""Running unmodified listener programs: their fanotify system calls are answered in the kernel's place (`fusehsm run`).

command.py     the mounts, the command, signals, the exit code
launch.py      starts the command under the filter (a program of its own)
filters.py     which system calls come to us: a BPF program for seccomp(2)
notifier.py    system calls as they come, and what to answer (seccomp_unotify(2))
workers.py     a thread for every call that is being answered
calls.py       what each system call does
groups.py      a group as the processes of the command share it
readiness.py   a group's descriptor in the command: readable while events wait, and a word when its last copy is closed
delivery.py    events into a process: its descriptors, its memory
parked.py      calls that wait: for events, for an answer; and the signals that end them
mappings.py    mmap(2) of files on our mounts
tasks.py       what /proc tells of a thread
lookup.py      what a path means to a process
memory.py      a process's memory
numbers.py     system call numbers and constants, by architecture
"""
