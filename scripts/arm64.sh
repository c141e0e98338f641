#!/bin/bash
# arm64.sh [ARGUMENTS]: runs tests under an emulated arm64 kernel and Debian's arm64 user land. It unpacks Debian's packages into an image (once), boots
# Debian's kernel with QEMU, and runs the parts of scripts/arm64-part there. A copy of the checkout is the machine's /checkout, read only. Nothing is
# installed on the host but QEMU, and no maintainer script of a package runs. With ARGUMENTS there is one part: pytest with these arguments. Ends with 1
# if a part fails. The results are in build/arm64/results/KERNEL/.
# Environment:
#   KERNEL=6.12           the kernel of Debian 13, or 6.18 and others of its backports
#   PARTS="pure run"      some parts only, in this order
#   ARM64_LIMIT=21600     seconds after which the machine is stopped
#   DEBIAN_MIRROR=URL     the mirror with the packages; default: the mirror of the host's own packages
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8
PATH=$PATH:/usr/sbin:/sbin

kernel=${KERNEL:-6.12}
parts=${PARTS:-doctor mount run pure}
[ $# = 0 ] || parts=${PARTS:-pytest}
limit=${ARM64_LIMIT:-21600}
root=$PWD
place=$root/build/arm64
name=arm64
. scripts/emulated.sh

# The machine's programs. A change of this list makes the image again.
packages=(base-files base-passwd bash coreutils dash findutils grep libc-bin passwd procps sed tar
    acl attr e2fsprogs fuse3 iproute2 libcap2-bin mount strace util-linux
    gcc git libc6-dev
    python3 python3-fsspec python3-hypothesis python3-pyfuse3 python3-pytest python3-pytest-rerunfailures python3-pytest-trio python3-pytest-xdist
    python3-rich python3-trio python3-typer
    python3-aiohttp python3-boto3 python3-paramiko python3-pygit2 python3-urllib3)

mkdir -p "$place"
# A package list of its own, in which no package is installed.
apt=$place/apt
options=(-qq -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$apt/lists" -o "Dir::State::status=$apt/status"
    -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User= -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=true)
update() {
    local release from
    from=$(debian_mirror) || return
    rm -rf "$apt"
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    touch "$apt/status"
    for release in trixie trixie-backports; do
        echo "deb [arch=arm64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $from $release main"
    done > "$apt/sources.list"
    apt-get "${options[@]}" update
}

make_image() {
    local tree=$place/tree package
    update || return
    say "fetching ${#packages[@]} packages and those that they need (160 MB, once)"
    apt-get "${options[@]}" --yes --no-install-recommends --download-only install "${packages[@]}" > /dev/null || return
    say "making the machine's root"
    rm -rf "$tree"
    mkdir -p "$tree"/usr/{bin,lib,sbin} "$tree"/{checkout,result,etc,var/cache/python}
    for package in bin lib sbin; do ln -s "usr/$package" "$tree/$package"; done
    for package in "$apt"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$tree" || return; done
    rm -rf "$apt/cache/archives" "$tree"/usr/share/{doc,man,locale}
    # What the packages' scripts would have made.
    cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
    cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
    ln -s ../proc/self/mounts "$tree/etc/mtab"
    echo "127.0.0.1 localhost" > "$tree/etc/hosts"
    truncate --size 4G "$place/root.new"
    mkfs.ext4 -q -F -d "$tree" "$place/root.new" || return
    rm -rf "$tree"
    echo "${packages[*]}" > "$place/root.packages"
    mv "$place/root.new" "$place/root.img"
}

# The kernel, and a first root with the modules that it needs to reach the image.
make_kernel() { # into $place/$kernel
    local tree=$place/$kernel.new first=$place/first package release module
    update || return
    package=$(apt-cache "${options[@]}" search --names-only "^linux-image-${kernel/./\\.}\.[0-9]+\+deb13-arm64$" | cut -d ' ' -f 1 | sort -V | tail -n 1)
    [ -n "$package" ] || { say "no linux-image-$kernel in Debian 13 and its backports"; return 1; }
    say "fetching $package and busybox (100 MB, once)"
    # From 7.1 on the modules may have a package of their own.
    local names=("$package" busybox-static) modules=linux-modules-${package#linux-image-}
    [ -z "$(apt-cache "${options[@]}" search --names-only "^${modules//+/\\+}$")" ] || names+=("$modules")
    rm -rf "$tree" "$first"
    mkdir -p "$tree" "$first"/{bin,modules,proc,sys,dev,root}
    (cd "$apt" && apt-get "${options[@]}" download "${names[@]}") || return
    for module in "$apt"/*.deb; do dpkg-deb --extract "$module" "$tree" || return; done
    rm -f "$apt"/*.deb
    cp "$tree/usr/bin/busybox" "$first/bin/" || return
    cp "$tree"/boot/vmlinuz-* "$tree/image"
    release=$(basename "$tree"/boot/vmlinuz-*)
    release=${release#vmlinuz-}
    [ -e "$tree/lib" ] || ln -s usr/lib "$tree/lib"
    depmod --basedir "$tree" "$release" || return
    for module in virtio_pci virtio_blk virtio_rng 9p 9pnet_virtio ext4 fuse loop overlay; do
        modprobe --dirname "$tree" --set-version "$release" --show-depends "$module" || return
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' > "$first/list"
    while read -r module; do
        case $module in
            *.xz) xz -dc "$module" > "$first/modules/$(basename "$module" .xz)" ;;
            *.zst) zstd -qdc "$module" > "$first/modules/$(basename "$module" .zst)" ;;
            *) cp "$module" "$first/modules/" ;;
        esac || return
        module=${module%.xz}
        basename "${module%.zst}" >> "$first/modules/order"
    done < "$first/list"
    cat > "$first/init" << 'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
cd /modules
while read -r module; do /bin/busybox insmod $module; done < order
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose checkout /root/checkout
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 result /root/result
for directory in proc sys dev; do /bin/busybox mount --move /$directory /root/$directory; done
exec /bin/busybox switch_root /root /bin/bash /result/guest.sh
INIT
    chmod 755 "$first/init" "$first/bin/busybox"
    (cd "$first" && find . | busybox cpio -o -H newc 2> /dev/null | gzip -1) > "$tree/first.cpio.gz" || return
    rm -rf "$first" "$tree"/{usr,lib,bin,boot,etc}
    rm -rf "${place:?}/$kernel"
    mv "$tree" "$place/$kernel"
}

[ -e "$place/root.img" ] && [ "$(cat "$place/root.packages")" = "${packages[*]}" ] || make_image ||
    fail "Debian's packages could not be fetched and unpacked (above); check the network, then run make again"
[ -d "$place/$kernel" ] || make_kernel || fail "Debian's kernel could not be fetched and unpacked (above); check the network, then run make again"

begin_run
# A copy, so that the checkout can be edited meanwhile.
mkdir "$run/result" "$run/checkout"
tar --create --exclude ./build --exclude './.*' --exclude __pycache__ . | tar --extract --directory "$run/checkout"
cp scripts/arm64-guest.sh "$run/result/guest.sh"
echo "$parts" > "$run/result/parts"
printf '%s\n' "$@" > "$run/result/arguments"
: > "$run/result/output"

say "Linux $kernel, software emulation: $parts; at most $limit s"
timeout --kill-after=10 "$limit" qemu-system-aarch64 -machine virt -cpu cortex-a72 -smp 2 -m 3G -nodefaults -display none -no-reboot \
    -serial "file:$run/console" -kernel "$place/$kernel/image" -initrd "$place/$kernel/first.cpio.gz" \
    -append "console=ttyAMA0 panic=-1 quiet" \
    -drive "file=$place/root.img,format=raw,if=virtio,cache=unsafe" -device virtio-rng-pci \
    -virtfs "local,path=$run/checkout,mount_tag=checkout,security_model=none,readonly=on,multidevs=remap" \
    -virtfs "local,path=$run/result,mount_tag=result,security_model=none,multidevs=remap" < /dev/null &
machine=$!
tail --pid="$machine" --lines=+1 --follow "$run/result/output"
code=0
wait "$machine" || code=$?
machine=
mkdir -p "$place/results/$kernel"
cp "$run/console" "$place/results/$kernel/console.log"
for log in "$run"/result/*.log "$run"/result/*.status; do [ ! -e "$log" ] || cp "$log" "$place/results/$kernel/"; done
if [ ! -e "$run/result/ended" ]; then
    why_ended "$code" "$parts" "$run/console"
    exit 1
fi
failed=0
for part in $parts; do
    [ "$(cat "$run/result/$part.status" 2> /dev/null)" = 0 ] || { say "$part failed"; failed=1; }
done
exit $failed
