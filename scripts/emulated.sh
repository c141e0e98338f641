# Sourced by oldkernel.sh and arm64.sh: what their emulated machines have in common. Both set `name`, for messages, and `place`, the directory for all
# that is fetched and made.
say() { echo "$name: $*" >&2; }
fail() { say "$*"; exit 1; }

debian_mirror() { # prints DEBIAN_MIRROR, by default the mirror of the host's own packages
    local found
    found=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/$' || true)}
    [ -n "$found" ] || { say "no Debian mirror in this machine's package sources; set DEBIAN_MIRROR to one's address"; return 1; }
    echo "$found"
}

machine= # the process of the machine that runs
begin_run() { # makes the directory $run, which goes at the end, and with it a machine that still runs
    run=$(mktemp -d "$place/run-XXXXXX")
    trap end_run EXIT
}
end_run() {
    [ -z "$machine" ] || kill "$machine" 2> /dev/null || true
    rm -rf "$run"
}

why_ended() { # exit code, what ran, its console: says why a machine ended too early
    tail -n 30 "$3" >&2
    if [ "$1" = 124 ] || [ "$1" = 137 ]; then
        say "$2 did not end within $limit s; the machine has been stopped"
    else
        say "the machine ended (exit code $1) before $2 did; the end of its console is above"
    fi
}
