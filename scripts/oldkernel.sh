#!/bin/bash
# oldkernel.sh [ARGUMENTS]: runs tests under an old Debian kernel, in a virtual machine without hardware virtualisation. The kernel's package is
# fetched and unpacked, not installed; the machine's root is this one's, read only. ARGUMENTS are pytest's, by default those of
# scripts/oldkernel-tests. Ends with pytest's exit code. Environment:
#   KERNEL=6.1            or 5.10
#   OLDKERNEL_LIMIT=1500  seconds after which the machine is stopped
#   DEBIAN_MIRROR=URL     where the kernel's package is, by default as this machine's other packages
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
    *) fail "KERNEL=$kernel: not a kernel that this knows; take 6.1 or 5.10" ;;
esac
[ "$(uname -m)" = x86_64 ] || fail "$(uname -m): the list of kernels holds those for x86_64 only"

mkdir -p "$place"
# A package list of its own: this machine may run another release of Debian.
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

# The machine writes nothing here but its output, so byte code is made now: compiling and pytest's rewriting take minutes in there.
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
printf '%s\n' "${arguments[@]}" > "$result/arguments"
: > "$result/output"
mkfifo "$result/input"
exec 3<> "$result/input" # an input without an end: at the end of its input QEMU polls it with all its might

say "Linux $kernel, software emulation, at most $limit s"
# What the guest sees at /run/host is this machine's root again, for oldkernel-guest.sh to mount with a cache.
PATH=$root/.venv/bin:$PATH timeout --kill-after=10 "$limit" vng --disable-kvm --force-9p --cpus 2 --memory 4G --run "$image" --rodir /run/host=/ --rwdir "/run/result=$result" \
    --exec "bash '$root/scripts/oldkernel-guest.sh' '$root' /run/result" <&3 3<&- > "$result/console" 2>&1 &
machine=$!
tail --pid="$machine" --lines=+1 --follow "$result/output"
code=0
wait "$machine" || code=$?
machine=
if [ ! -s "$result/status" ]; then
    tail -n 30 "$result/console" >&2
    [ "$code" != 124 ] && [ "$code" != 137 ] || fail "the tests did not end within $limit s; the machine has been stopped"
    fail "the machine ended (exit code $code) before the tests did; what its console said is above"
fi
exit "$(cat "$result/status")"
