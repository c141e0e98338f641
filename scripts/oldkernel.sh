#!/bin/bash
# oldkernel.sh [--here | --command COMMAND | ARGUMENTS]: measures fusehsm under an old Debian kernel, in a virtual machine without hardware
# virtualisation. The kernel's package is fetched and unpacked, not installed. The machine's root is the host's, read only. Each part
# (scripts/oldkernel-part) runs in a machine of its own, and leaves its result in build/oldkernel/results/KERNEL/PART/, from which
# scripts/old_kernels.py makes docs/old-kernels.md. With ARGUMENTS there is one part: pytest with these arguments. --here: the parts that compare,
# under this machine's own kernel. --command: a shell command in the machine, as root, in the checkout. Ends with 1 if a part fails.
# Environment:
#   KERNEL=6.1             or 5.10, 6.12
#   PARTS="conform doctor" some parts only
#   WORKLOADS="uring ..."  only these workloads of the parts that compare
#   APPEND="security=selinux" more parameters for the kernel
#   OLDKERNEL_LIMIT=1500   seconds after which a machine is stopped; default: 1500 with ARGUMENTS, else 7200
#   DEBIAN_MIRROR=URL      the mirror with the kernel's package; default: the mirror of the host's own packages
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8
PATH=$PATH:/usr/sbin:/sbin

kernel=${KERNEL:-6.1}
parts=${PARTS:-doctor programs listeners core conform view pyfuse3 first-access}
limit=7200
[ $# = 0 ] || { parts=pytest limit=1500; }
[ "${1:-}" != --command ] || parts=command
limit=${OLDKERNEL_LIMIT:-$limit}
root=$PWD
place=$root/build/oldkernel
name=oldkernel
. scripts/emulated.sh

if [ "${1:-}" = --here ]; then
    # The column to compare with: this machine's own kernel, without an emulated machine.
    kernel=$(uname -r | cut -d . -f 1,2)
    status=0
    for part in ${PARTS:-conform view pyfuse3 first-access}; do
        kept=$place/results/$kernel/$part
        mkdir -p "$kept"
        : > "$kept/workloads"
        scripts/oldkernel-part "$kept" "$part" || status=1
        mv "$kept/$part.json" "$kept/$(date +%Y%m%d-%H%M%S).json"
        rm "$kept/workloads"
    done
    exit $status
fi
case $kernel in
    5.10) release=bullseye ;;
    6.1) release=bookworm ;;
    6.12) release=trixie ;;
    *) fail "KERNEL=$kernel: not in the list of kernels; give 5.10, 6.1 or 6.12" ;;
esac
[ "$(uname -m)" = x86_64 ] || fail "$(uname -m): the kernels in the list are for x86_64 only; run it on such a machine"

mkdir -p "$place"
# A separate package list: the host may run another release of Debian.
fetch_kernel() { # into $place/$kernel
    local apt=$place/apt package mirror
    mirror=$(debian_mirror) || return
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    echo "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" > "$apt/$release.list"
    local options=(-qq -o "Dir::Etc::SourceList=$apt/$release.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User= -o APT::Architecture=amd64)
    apt-get "${options[@]}" update || return
    package=$(apt-cache "${options[@]}" search --names-only "^linux-image-${kernel/./\\.}\.[0-9.]+(-[0-9]+|\+deb[0-9]+)-amd64$" | cut -d ' ' -f 1 | sort -V | tail -n 1)
    [ -n "$package" ] || { say "no linux-image-$kernel in Debian $release"; return 1; }
    say "fetching $package (70 MB, once)"
    (cd "$apt" && rm -f ./*.deb && apt-get "${options[@]}" download "$package") || return
    rm -rf "$place/$kernel.new"
    dpkg-deb --extract "$apt"/*.deb "$place/$kernel.new" || return
    rm -f "$apt"/*.deb
    mv "$place/$kernel.new" "$place/$kernel"
}
[ -d "$place/$kernel" ] || fetch_kernel || fail "Debian's kernel $kernel could not be fetched (above); check the network, then run make again"
image=$(echo "$place/$kernel"/boot/vmlinuz-*)

# The machine writes only its results, so byte code is made now: compiling and pytest's rewriting would take minutes in the machine.
[ "${1:-}" = --command ] || collected=$(.venv/bin/python -m pytest --collect-only --quiet "${@:-tests}" 2>&1) || { echo "$collected" | tail -n 20 >&2; fail "pytest cannot collect the tests (above)"; }
.venv/bin/python -m compileall -q fusehsm tests
mkdir -p "$place/programs"
.venv/bin/python -m tests.support.listener_programs.building "$place/programs"

begin_run
mkfifo "$run/input"
exec 3<> "$run/input" # an input without an end: at the end of its input QEMU polls in a busy loop

in_machine() { # part, arguments of the part: runs it, and says how it ended
    local part=$1 result=$run/result code=0
    rm -rf "$result" && mkdir "$result"
    # The machine's own /tmp and /var/tmp would hide a checkout that lies there.
    cp scripts/oldkernel-guest.sh "$result/guest.sh"
    printf '%s\n' "$@" > "$result/arguments"
    printf '%s' "${WORKLOADS:-}" > "$result/workloads"
    : > "$result/output"
    say "Linux $kernel, software emulation, $part, at most $limit s"
    # /run/host in the guest is the host's root again; oldkernel-guest.sh mounts it with a cache.
    PATH=$root/.venv/bin:$PATH timeout --kill-after=10 "$limit" vng --disable-kvm --force-9p --cpus 2 --memory 4G ${APPEND:+--append "$APPEND"} --run "$image" --rodir /run/host=/ --rwdir "/run/result=$result" \
        --exec "bash /run/result/guest.sh '$root' /run/result" <&3 3<&- > "$result/console" 2>&1 &
    machine=$!
    tail --pid="$machine" --lines=+1 --follow "$result/output"
    wait "$machine" || code=$?
    machine=
    if [ ! -s "$result/status" ]; then
        why_ended "$code" "$part" "$result/console"
        return 1
    fi
    if [ $# = 1 ]; then
        local kept=$place/results/$kernel/$part/$(date +%Y%m%d-%H%M%S)
        mkdir -p "${kept%/*}"
        cp "$result/output" "$kept.log"
        ! [ -e "$result/$part.json" ] || cp "$result/$part.json" "$kept.json"
    fi
    [ "$(cat "$result/status")" = 0 ] || { say "$part failed (exit code $(cat "$result/status"))"; return 1; }
}

failed=0
for part in $parts; do
    in_machine "$part" "$@" || failed=1
done
exit $failed
