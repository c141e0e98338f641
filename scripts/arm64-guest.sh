#!/bin/bash
# The first process of the machine of scripts/arm64.sh. Runs the parts that /result/parts names, one after the other; writes /result/output, and for each
# part /result/PART.log and /result/PART.status. Then it turns the machine off.
set -u
exec < /dev/null > /result/output 2>&1
export PATH=/usr/local/bin:/usr/bin:/usr/sbin TMPDIR=/tmp HOME=/tmp LC_ALL=C.UTF-8 TZ=UTC
mount -t tmpfs -o mode=1777 scratch /tmp
mount -t tmpfs -o mode=755 run /run
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts devpts /dev/pts
ln -sf /proc/self/fd /dev/fd
chmod 666 /dev/fuse # the mode that udev sets
ip link set lo up
hostname arm64 2> /dev/null || echo arm64 > /proc/sys/kernel/hostname
if [ ! -e /etc/ld.so.cache ]; then
    # An ordinary user may have made the image. Packages' scripts would have made the rest.
    [ "$(stat --format %u /usr/bin)" = 0 ] || chown --recursive --no-dereference 0:0 /usr /etc /var /root /home /srv /opt
    chmod u+s /usr/bin/fusermount3
    ldconfig
fi
# As `pip install --editable` would do it.
echo /checkout > /usr/lib/python3/dist-packages/fusehsm.pth
# Byte code goes to the image, so that the second run is faster.
export PYTHONPYCACHEPREFIX=/var/cache/python HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
# This machine is much slower than the host.
export FUSEHSM_TESTS_LONGEST=1200 FUSEHSM_TESTS_PATIENCE=600
cd /checkout

mapfile -t arguments < /result/arguments
echo "Linux $(uname -r), $(uname -m), pages of $(getconf PAGESIZE) bytes, $(python3 --version)"
for part in $(cat /result/parts); do
    echo "arm64: $part"
    { time bash scripts/arm64-part "$part" "${arguments[@]}"; } 2>&1 | tee "/result/$part.log"
    echo "${PIPESTATUS[0]}" > "/result/$part.status"
done
touch /result/ended
sync
mount -o remount,ro / 2> /dev/null
echo o > /proc/sysrq-trigger
sleep 60
