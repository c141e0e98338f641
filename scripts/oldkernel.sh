#!/bin/bash
# oldkernel.sh [ARGUMENTS]: runs tests under an old Debian kernel, in a virtual machine without hardware virtualisation. The kernel's package is
# fetched and unpacked, not installed. The machine's root is the host's, read only. ARGUMENTS are pytest's, by default those of
# scripts/oldkernel-tests. Ends with pytest's exit code. Environment:
#   KERNEL=6.1            or 5.10
#   OLDKERNEL_LIMIT=1500  seconds after which the machine is stopped
#   DEBIAN_MIRROR=URL     the mirror with the kernel's package; default: the mirror of the host's own packages
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8
PATH=$PATH:/usr/sbin:/sbin

kernel=${KERNEL:-6.1}
limit=${OLDKERNEL_LIMIT:-1500}
root=$PWD
place=$root/build/oldkernel
say() { echo "oldkernel: $*" >&2; }
fail() { say "$*"; exit 1; }

case $kernel in
    5.10) release=bullseye ;;
    6.1) release=bookworm ;;
    *) fail "KERNEL=$kernel: not in the list of kernels; give 6.1 or 5.10" ;;
esac
[ "$(uname -m)" = x86_64 ] || fail "$(uname -m): the kernels in the list are for x86_64 only; run it on such a machine"

mkdir -p "$place"
# A separate package list: the host may run another release of Debian.
fetch_kernel() { # into $place/$kernel
    local apt=$place/apt name mirror
    mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/$' || true)}
    [ -n "$mirror" ] || { say "no Debian mirror in this machine's package sources; set DEBIAN_MIRROR to one's address"; return 1; }
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    echo "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" > "$apt/$release.list"
    local options=(-qq -o "Dir::Etc::SourceList=$apt/$release.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User= -o APT::Architecture=amd64)
    apt-get "${options[@]}" update || return
    name=$(apt-cache "${options[@]}" search --names-only "^linux-image-${kernel/./\\.}\.[0-9.]+-[0-9]+-amd64$" | cut -d ' ' -f 1 | sort -V | tail -n 1)
    [ -n "$name" ] || { say "no linux-image-$kernel in Debian $release"; return 1; }
    say "fetching $name (70 MB, once)"
    (cd "$apt" && rm -f ./*.deb && apt-get "${options[@]}" download "$name") || return
    rm -rf "$place/$kernel.new"
    dpkg-deb --extract "$apt"/*.deb "$place/$kernel.new" || return
    rm -f "$apt"/*.deb
    mv "$place/$kernel.new" "$place/$kernel"
}
[ -d "$place/$kernel" ] || fetch_kernel || fail "Debian's kernel $kernel could not be fetched (above); check the network, then run make again"
image=$(echo "$place/$kernel"/boot/vmlinuz-*)

# The machine writes only its output here, so byte code is made now: compiling and pytest's rewriting would take minutes in the machine.
arguments=("$@")
[ $# -gt 0 ] || mapfile -t arguments < <(grep -v -e '^#' -e '^$' scripts/oldkernel-tests)
collected=$(.venv/bin/python -m pytest --collect-only --quiet "${arguments[@]}" 2>&1) || { echo "$collected" | tail -n 20 >&2; fail "pytest cannot collect the tests (above)"; }
.venv/bin/python -m compileall -q fusehsm tests

result=$(mktemp -d "$place/run-XXXXXX")
machine=
finish() {
    [ -z "$machine" ] || kill "$machine" 2> /dev/null || true
    rm -rf "$result"
}
trap finish EXIT
# The machine's own /tmp and /var/tmp would hide a checkout that lies there.
cp scripts/oldkernel-guest.sh "$result/guest.sh"
printf '%s\n' "${arguments[@]}" > "$result/arguments"
: > "$result/output"
mkfifo "$result/input"
exec 3<> "$result/input" # an input without an end: at the end of its input QEMU polls in a busy loop

say "Linux $kernel, software emulation, at most $limit s"
# /run/host in the guest is the host's root again; oldkernel-guest.sh mounts it with a cache.
PATH=$root/.venv/bin:$PATH timeout --kill-after=10 "$limit" vng --disable-kvm --force-9p --cpus 2 --memory 4G --run "$image" --rodir /run/host=/ --rwdir "/run/result=$result" \
    --exec "bash /run/result/guest.sh '$root' /run/result" <&3 3<&- > "$result/console" 2>&1 &
machine=$!
tail --pid="$machine" --lines=+1 --follow "$result/output"
code=0
wait "$machine" || code=$?
machine=
if [ ! -s "$result/status" ]; then
    tail -n 30 "$result/console" >&2
    [ "$code" != 124 ] && [ "$code" != 137 ] || fail "the tests did not end within $limit s; the machine has been stopped"
    fail "the machine ended (exit code $code) before the tests did; the end of its console is above"
fi
exit "$(cat "$result/status")"
