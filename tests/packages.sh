# shellcheck shell=bash
# Debian packages for tests/run and tests/lab. Sourced, never run.
# The sourcing script defines fail MESSAGE..., which prints and exits.

# Administrators' tools (depmod, modprobe) are not on every PATH.
PATH=$PATH:/usr/sbin:/sbin

# as_root COMMAND...: runs it as root, by sudo where sudo asks nothing.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

can_be_root() {
    [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null
}

# install_packages PACKAGE...
install_packages() {
    command -v apt-get >/dev/null ||
        fail "these Debian packages are missing and there is no apt-get: $*. Install what they hold and run this again."
    can_be_root || fail "missing packages. As root, run: apt-get install --no-install-recommends $*"
    with_fresh_lists as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" ||
        fail "apt-get could not install $*; its messages are above"
}

# missing COMMAND:PACKAGE...: the packages whose command, or file by its whole path, is missing.
missing() {
    local pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || [ -e "${pair%%:*}" ] || echo "${pair#*:}"
    done
}

# need COMMAND:PACKAGE...: installs the packages whose command is missing, all in one go. One that is installed may make apt
# remove another (a newer one from backports), so what is missing then is installed, too.
need() {
    local packages round
    for round in 1 2; do
        mapfile -t packages < <(missing "$@")
        [ ${#packages[@]} -gt 0 ] || return 0
        echo "installing ${packages[*]} (round $round)" >&2
        install_packages "${packages[@]}"
        hash -r
    done
    mapfile -t packages < <(missing "$@")
    [ ${#packages[@]} -eq 0 ] || fail "installed, and still without their commands: ${packages[*]}"
}

# with_fresh_lists COMMAND...: tries the command, and once more after apt-get update: package lists that are
# empty or older than the last security update are the usual reason for a failure.
with_fresh_lists() {
    local log
    log=$("$@" 2>&1 </dev/null) && return 0
    if can_be_root; then
        log=$(as_root apt-get update -qq 2>&1 </dev/null; "$@" 2>&1 </dev/null) && return 0
    fi
    printf '%s\n' "$log" >&2
    return 1
}

# unpack PACKAGE DIRECTORY: fetches the package's newest version and unpacks it there, without installing it.
unpack() {
    mkdir -p "$2"
    (cd "$2" && with_fresh_lists apt-get download -qq "$1") ||
        fail "could not download the Debian package $1; apt's messages are above"
    dpkg -x "$2/$1"_*.deb "$2"
    rm -f "$2/$1"_*.deb
}

# tools DIRECTORY COMMAND:PACKAGE...: unpacks the packages whose command is neither on the PATH nor there already. For
# programs whose packages would start a server when they are installed.
tools() {
    local pair directory=$1
    shift
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || [ -x "$directory/usr/bin/${pair%%:*}" ] || unpack "${pair#*:}" "$directory"
    done
}
