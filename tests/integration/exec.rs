//! `samepage exec`: commands in a Linux guest, from the lab's shell.

use std::time::Duration;

use tests::lab::lab_script;
use tests::require_tool;

use super::guide::{debian, lab_head};
use super::nested::need_image;

#[test]
fn lab_commands_run_in_a_debian_guest() {
    let _ = require_tool!("mmdebstrap");
    need_image();
    let body = r#"
        samepage run --memory 256M --kernel "$image/vmlinux" --initrd "$image/initrd.cpio" --drive root.img,overlay \
            --vsock cid=3,path=./v.sock --console none --cmdline 'console=ttyS0 quiet panic=-1 root=/dev/vda rw' </dev/null &
        vm=$!
        until samepage exec ./v.sock -- true 2>/dev/null; do sleep 1; done
        in_guest() { local s=0; samepage exec ./v.sock -- "$@" || s=$?; echo "status $s"; }
        head -c 3000000 /dev/urandom >in
        samepage exec ./v.sock -- cat <in >out
        cmp in out && echo the bytes are the same
        in_guest sh -c 'echo to error >&2; exit 7' 2>error
        grep 'to error' error
        in_guest no-such-program
        in_guest sh -c 'kill -KILL $$'
        # One that does not read its input, and one that closes its output, hold nothing up.
        in_guest sh -c 'exit 3' <in
        in_guest sh -c 'exec >&- 2>&-; sleep 1; exit 4'
        samepage exec ./v.sock -- sh -c 'trap "echo trapped; exit 9" TERM; echo waits; while :; do sleep 0.2; done' >trap </dev/null &
        it=$!
        until grep -q waits trap; do sleep 0.2; done
        kill -TERM $it
        s=0
        wait $it || s=$?
        echo "signal $s $(tr '\n' ' ' <trap)"
        # What was left by the host ends, too.
        samepage exec ./v.sock -- sleep 4711 </dev/null &
        it=$!
        until samepage exec ./v.sock -- pgrep -f 'sleep 4711'; do sleep 0.2; done
        kill -KILL $it
        while samepage exec ./v.sock -- pgrep -x sleep; do sleep 0.2; done
        # It may be off before its status is there.
        samepage exec ./v.sock -- poweroff || true
        wait $vm && echo the guest has ended
        s=0
        samepage exec ./v.sock -- true 2>late || s=$?
        echo "late $s"
        grep 'does not answer' late
    "#;
    let (root, image) = (debian(), tests::lab::image_dir());
    let head = format!("{}\nln -s {} root.img\nimage={}\n", lab_head(), root.display(), image.display());
    let outcome = lab_script(Duration::from_secs(300), &(head + body)).success();
    for words in [
        "the bytes are the same",
        "status 7",
        "status 127",
        "status 137",
        "status 3",
        "status 4",
        "signal 9 waits trapped",
        "the guest has ended",
        "late 1",
    ] {
        assert!(outcome.stdout.contains(words), "no {words:?}: {outcome}");
    }
}

/// What a Debian has written to its disk each clone of it has, and what one writes then no other sees.
#[test]
fn lab_clones_of_a_debian_on_a_disk_write_apart() {
    let _ = require_tool!("mmdebstrap");
    need_image();
    let body = r#"
        cat >fleet.toml <<END
name = "disks"
pool = 2
[overcommit]
admission = "off"
policy = false
[[guest]]
name = "deb"
memory = "192M"
kernel = "$image/vmlinux"
initrd = "$image/initrd.cpio"
cmdline = "console=ttyS0 quiet panic=-1 root=/dev/vda rw"
drives = [{ path = "root.img", overlay = true }]
vsock = true
END
        samepage fleet up fleet.toml
        samepage exec deb -- sh -c 'head -c 3000000 /dev/urandom >/big && sync && sha256sum </big >/sum && echo before >/said'
        samepage clone deb --count 2
        for guest in deb deb-0 deb-1; do
            # From the disk, and not from what it had in memory.
            samepage exec $guest -- sh -c 'echo 3 >/proc/sys/vm/drop_caches; sha256sum </big | cmp - /sum && cat /said' | sed "s/^/$guest: /"
            samepage exec $guest -- sh -c "echo $guest >/said && dd if=/dev/zero of=/big bs=4096 count=1 conv=notrunc && sync"
        done
        samepage clone deb-0 --as again
        for guest in deb deb-0 deb-1 again-0; do
            samepage exec $guest -- sh -c 'echo 3 >/proc/sys/vm/drop_caches; cat /said' | sed "s/^/$guest: now /"
        done
        samepage fleet down --now
    "#;
    let (root, image) = (debian(), tests::lab::image_dir());
    let head = format!("{}\nln -s {} root.img\nimage={}\n", lab_head(), root.display(), image.display());
    let outcome = lab_script(Duration::from_secs(400), &(head + body)).success();
    for words in [
        "deb: before",
        "deb-0: before",
        "deb-1: before",
        "deb: now deb",
        "deb-0: now deb-0",
        "deb-1: now deb-1",
        "again-0: now deb-0",
    ] {
        assert!(outcome.stdout.lines().any(|line| line == words), "no {words:?}: {outcome}");
    }
}
