#!/bin/bash
# bootstrap.sh [--list] [demo | bench | tests | oldkernel | arm64]: sets up everything for the target of make of that name (tests: `make test`): system
# packages (Debian, Ubuntu), /dev/fuse, and a virtual environment in .venv. Each gets only the packages that it uses, and one line names them all before
# the first is installed. If everything is there, it is quick. For a step that it cannot do, it prints one line.
# With --list it prints the packages, also those that are there, and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
PATH=$PATH:/usr/sbin:/sbin # mkfs.ext4 and losetup are not in every user's PATH

LIST=no
if [ "${1:-}" = --list ]; then LIST=yes; shift; fi
FOR=${1:-tests}
OLDEST=11 # Python 3.11
VENV=.venv
STAMP=$VENV/fusehsm-setup

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }
# The addresses of package indexes and proxies may be private and may contain passwords, so they are removed from the log.
without_addresses() { sed -E "s#[a-z+]+://[^ '\")]+#(address)#g; s#host='[^']*'#host=(address)#g; s#[^ ]+@[^ ]+:[0-9]+#(address)#g"; }

is_root() { [ "$(id -u)" = 0 ]; }
as_root() { # runs a command as root; fails if sudo would ask for a password without a terminal
    if is_root; then "$@"
    elif ! command -v sudo > /dev/null; then return 1
    elif sudo -n true 2> /dev/null; then sudo --preserve-env=DEBIAN_FRONTEND,DEBCONF_NOWARNINGS,LC_ALL "$@"
    elif [ -t 0 ] && [ -t 2 ]; then say "sudo for: $*"; sudo --preserve-env=DEBIAN_FRONTEND,DEBCONF_NOWARNINGS,LC_ALL "$@"
    else return 1
    fi
}

APT_UPDATED=no
apt_update() {
    [ $APT_UPDATED = yes ] && return
    as_root apt-get -qq update 2>&1 | without_addresses >&2 || return 1
    APT_UPDATED=yes
}
can_install() { # packages
    command -v apt-get > /dev/null || fail "missing: $*; install what Debian calls so and try again"
    as_root true || fail "missing: $*; run: sudo apt-get install $*"
}
install_packages() {
    local by_hand="sudo apt-get install $*"
    apt_update || fail "apt-get update failed; fix the package sources, then run: $by_hand"
    as_root apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" 2>&1 > /dev/null | without_addresses >&2 ||
        fail "apt-get could not install these packages; run: $by_hand"
}

python_is_new_enough() { "$1" -c "import sys; raise SystemExit(sys.version_info < (3, $OLDEST))" 2> /dev/null; }
find_python() {
    local name path
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14; do
        path=$(command -v "$name") || continue
        python_is_new_enough "$path" && { echo "$path"; return 0; }
    done
    return 1
}
python_packages() { # what to install where no Python is new enough
    local minor
    command -v apt-get > /dev/null && as_root true && apt_update ||
        fail "no Python 3.$OLDEST or later: none of python3, python3.11, python3.12, python3.13; install one (sudo apt-get install python3.11 python3.11-venv python3.11-dev) or set PYTHON=/path/to/it"
    minor=$(apt-cache show --no-all-versions python3 2> /dev/null | sed -nE 's/^Version: 3\.([0-9]+).*/\1/p')
    if [ "${minor:-0}" -ge $OLDEST ]; then
        echo python3 python3-venv python3-dev
        return
    fi
    for minor in 13 12 11; do
        if [ -n "$(apt-cache search --names-only "^python3\.$minor-venv\$")" ]; then
            echo "python3.$minor" "python3.$minor-venv" "python3.$minor-dev"
            return
        fi
    done
    fail "no Python 3.$OLDEST or later here or in the package sources; install one and set PYTHON=/path/to/it"
}
has() { [ $LIST = no ] && "$@"; } # a test; with --list nothing is there
of_python() { # venv, ensurepip and headers belong to the interpreter, of any origin
    local version package
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    package=python$version
    case $(readlink -f "$1") in /usr/bin/*) ;; *) package=python3 ;; esac
    has "$1" -c 'import venv, ensurepip' 2> /dev/null || echo "$package-venv"
    has [ -e "$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || echo "$package-dev"
}

# The missing packages. The checks look for the tools and not for package names, so another distribution or another Python works too.
need() { # package, tools that it has
    local package=$1 tool; shift
    for tool in "$@"; do has command -v "$tool" > /dev/null || { echo "$package"; return; }; done
}
missing_packages() {
    # fusehsm itself, with its engine pyfuse3, which pip compiles
    need gcc gcc
    has [ -e /usr/include/stdio.h ] || echo libc6-dev
    need pkg-config pkg-config
    has pkg-config --exists fuse3 2> /dev/null || echo libfuse3-dev
    need fuse3 fusermount3
    need mount mount umount
    has [ -e /dev/fuse ] || need kmod modprobe
    if [ "$FOR" != demo ]; then
        need e2fsprogs mkfs.ext4
        need mount losetup
        need bindfs bindfs
    fi
    if [ "$FOR" = bench ]; then
        need rsync rsync
        need curl curl
    fi
    if [ "$FOR" = tests ] || [ "$FOR" = oldkernel ]; then
        need acl setfacl
        need attr setfattr
        need libcap2-bin setcap
        need git git
    fi
    if [ "$FOR" = tests ]; then
        need golang-go go # a listener whose runtime has signals and an epoll of its own
        need iproute2 ip # networks of their own, as of several machines
        need strace strace # counts what an event costs
        need sqlite3 sqlite3 # a program for `fusehsm conform`
    fi
    if [ "$FOR" = oldkernel ]; then
        need qemu-system-x86 qemu-system-x86_64
        need kmod depmod
        need busybox-static busybox
        need dpkg dpkg-deb
        need golang-go go
        # Programs that map files shared (tests/test_mapping_programs.py).
        need default-jdk-headless javac
        need apparmor apparmor_parser # loads the profiles of tests/test_security_modules.py
        has [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
    fi
    if [ "$FOR" = arm64 ]; then
        need qemu-system-arm qemu-system-aarch64
        need kmod depmod
        need busybox-static busybox
        need dpkg dpkg-deb
        need xz-utils xz
        need zstd zstd
        has [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
    fi
}

# Servers that only tests and measurements use. These start them with configurations of their own, so the installation must not start them.
missing_servers() {
    case $FOR in tests | bench | oldkernel) ;; *) return 0 ;; esac
    if [ "$FOR" = oldkernel ]; then
        compgen -G '/usr/lib/postgresql/*/bin/initdb' > /dev/null && [ "$LIST" = no ] || echo postgresql
        return 0
    fi
    need nginx-light nginx
    [ "$FOR" = tests ] || return 0
    need openssh-server sshd
    need memcached memcached # for swift, which comes with pip
}
install_servers() { # packages
    local policy=/usr/sbin/policy-rc.d ours=no
    if [ ! -e $policy ] && printf '#!/bin/sh\nexit 101\n' | as_root tee $policy > /dev/null; then
        ours=yes
        as_root chmod 755 $policy
    fi
    (install_packages "$@") || { [ $ours = no ] || as_root rm -f $policy; exit 1; }
    [ $ours = no ] || as_root rm -f $policy
    # They must not start at the next boot either. A server that was installed before is not changed.
    if command -v systemctl > /dev/null; then
        case " $* " in *" nginx-light "*) as_root systemctl --quiet disable nginx.service 2> /dev/null || true ;; esac
        case " $* " in *" memcached "*) as_root systemctl --quiet disable memcached.service 2> /dev/null || true ;; esac
        case " $* " in *" openssh-server "*) as_root systemctl --quiet disable ssh.service ssh.socket 2> /dev/null || true ;; esac
    fi
}

python=$(find_python) || python=
if [ -n "$python" ]; then for_python=$(of_python "$python"); else for_python=$(python_packages); fi
mapfile -t packages < <({ [ -z "$for_python" ] || echo "$for_python"; missing_packages; } | tr ' ' '\n' | awk '!seen[$0]++')
mapfile -t servers < <(missing_servers)
if [ $LIST = yes ]; then
    [ ${#packages[@]} = 0 ] || printf '%s\n' "${packages[@]}"
    [ ${#servers[@]} = 0 ] || printf '%s\n' "${servers[@]}"
    exit 0
fi
if [ $((${#packages[@]} + ${#servers[@]})) -gt 0 ]; then
    can_install "${packages[@]}" "${servers[@]}"
    say "installing ${packages[*]}${servers[*]:+ ${servers[*]} (servers are not started)}"
    [ ${#packages[@]} = 0 ] || install_packages "${packages[@]}"
    [ ${#servers[@]} = 0 ] || install_servers "${servers[@]}"
    hash -r
fi
if [ -z "$python" ]; then
    python=$(find_python) || fail "no Python 3.$OLDEST or later; install one and set PYTHON=/path/to/it"
fi

# Minimal images lack /etc/mtab, and without it fusermount3 cannot unmount.
[ -e /etc/mtab ] || as_root ln -s ../proc/self/mounts /etc/mtab || say "/etc/mtab: missing; ordinary users cannot unmount; as root: ln -s ../proc/self/mounts /etc/mtab"

if [ ! -e /dev/fuse ]; then
    as_root modprobe fuse 2> /dev/null || true
    [ -e /dev/fuse ] || say "/dev/fuse: missing, and modprobe fuse did not bring it; mounting will fail (in a container: start it with --device /dev/fuse --cap-add SYS_ADMIN)"
fi

pip_install() { # arguments of pip install
    local log=$VENV/setup.log
    if ! $VENV/bin/python -m pip install --quiet --disable-pip-version-check --no-input "$@" > $log 2>&1; then
        tail -n 15 $log | without_addresses >&2
        fail "pip could not install the dependencies (above); check the network or the package index, then run make again"
    fi
    rm -f $log
}

# The environment is made again only if one of these changes: the interpreter, the dependencies, the directory (scripts in a venv contain absolute
# paths). The tests' packages are added at their first run.
made=$({ "$python" -c 'import sys; print(sys.version, sys.base_prefix)'; pwd; cat pyproject.toml scripts/bootstrap.sh; } | sha256sum)
case $FOR in
    demo) packages=. enough=("." ".[http]" ".[test]") ;;
    bench) packages=".[http]" enough=(".[http]" ".[test]") ;;
    *) packages=".[test]" enough=(".[test]") ;;
esac
installed=$(cat $STAMP 2> /dev/null || true)
installed=${installed#"$made "}
case " ${enough[*]} " in
    *" $installed "*) ;;
    *)
        if [ "$installed" != . ] && [ "$installed" != ".[http]" ]; then
            say "making $VENV (a minute or two, once)"
            rm -f $STAMP
            "$python" -m venv --clear $VENV
        fi
        pip_install -e "$packages"
        echo "$made $packages" > $STAMP
        ;;
esac

if [ "$FOR" = oldkernel ] && [ ! -x $VENV/bin/vng ]; then pip_install virtme-ng==1.42; fi
