"""What a shell does for one command at its terminal (stdin), which it leads the session of: job_control.py COMMAND...

Says "stopped" when the command has stopped; a line that is typed then brings it back to the foreground. Its exit code is the command's.
"""

import os
import signal
import subprocess
import sys


def main() -> int:
    """Run the command to its end."""
    child = subprocess.Popen(sys.argv[1:], process_group=0)
    # Who is not in the foreground may hand it on only so.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, child.pid)
    while True:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        os.tcsetpgrp(0, os.getpgrp())
        print("stopped", flush=True)
        sys.stdin.readline()
        os.tcsetpgrp(0, child.pid)
        os.killpg(child.pid, signal.SIGCONT)


if __name__ == "__main__":
    sys.exit(main())
