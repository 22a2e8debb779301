#!/bin/sh
# The first process of a guest whose tree has none: mounts, a name, and a shell on the console.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
place() {
    mkdir -p "$2" 2>/dev/null
    grep -q " $2 " /proc/mounts 2>/dev/null || mount -t "$1" "$1" "$2"
}
place proc /proc
place sysfs /sys
place devtmpfs /dev
case " $(cat /proc/cmdline) " in
*' ro '*) ;;
*) mount -o remount,rw / ;;
esac
place tmpfs /run
place devpts /dev/pts
[ -s /etc/hostname ] && hostname "$(cat /etc/hostname)"
ip link set lo up 2>/dev/null

# Process 1 ends everything, and then the machine.
end() {
    trap '' USR1 USR2
    kill -TERM -1 2>/dev/null
    sleep 1
    kill -KILL -1 2>/dev/null
    sync
    mkfifo /run/end
    mount -o remount,ro /
    echo "$1" >/proc/sysrq-trigger
    # The disk is gone from now on: nothing else may be read from it.
    while :; do read -r _ <>/run/end; done
}
trap 'end o' USR2
trap 'end b' USR1

console=$(cat /sys/class/tty/console/active)
console=/dev/${console##* }
while :; do
    setsid --ctty --wait sh -l <"$console" >"$console" 2>&1 &
    wait $!
    sleep 1
done
