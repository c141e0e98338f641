#!/bin/bash
# Runs inside the virtual machine of scripts/oldkernel.sh: oldkernel-guest.sh CHECKOUT RESULT. Reads the part's name and its arguments from
# RESULT/arguments, a line each; writes RESULT/output and, at the end, its exit code to RESULT/status.
set -u
root=$1 result=$2
exec > "$result/output" 2>&1

# The kernel's modules lie in the checkout, which the machine's own /tmp or /var/tmp may hide.
mkdir -p "$root"
mount --bind "/run/host$root" "$root"
modprobe --all fuse ext4 loop # before /usr is covered: the modules lie in a tmpfs there
umount "$root"
mountpoint -q /sys/kernel/security || mount -t securityfs securityfs /sys/kernel/security # AppArmor's profiles are loaded there
chmod 666 /dev/fuse # the mode that udev sets

# The machine's root file system asks the host for every byte every time. So programs come from a second mount of the host, with an unlimited cache.
# Temporary files go to a tmpfs: the machine's overlay at /tmp lacks O_TMPFILE, for example.
tag=$(awk '$2 == "/run/host" { print $1 }' /proc/mounts)
python=$(readlink --canonicalize "/run/host$root/.venv/bin/python")
umount /run/host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose "$tag" /run/host
mount -t tmpfs -o mode=1777 scratch /tmp
for directory in /usr "${python%/bin/*}" "$root"; do
    mkdir -p "$directory"
    mount --bind "/run/host$directory" "$directory"
done
cd "$root"
export TMPDIR=/tmp HOME=/tmp PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis PATH=$PATH:/usr/sbin:/sbin

# This machine is ten to fifty times slower than the host.
export FUSEHSM_TESTS_LONGEST=900 FUSEHSM_TESTS_PATIENCE=300 FUSEHSM_TESTS_PROGRAMS=$root/build/oldkernel/programs
unset CI # this kernel has no pre-content events; with CI set that would be a failure

mapfile -t arguments < "$result/arguments"
echo "Linux $(uname -r)"
bash scripts/oldkernel-part "$result" "${arguments[@]}"
echo $? > "$result/status"
sync
