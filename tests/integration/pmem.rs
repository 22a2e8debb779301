//! Files that a guest has as memory: `samepage run --pmem`, in the lab's shell.

use std::time::Duration;

use tests::lab::lab_script;
use tests::require_tool;
use tests::sandbox::Sandbox;

use super::guide::{debian, lab_head};
use super::nested::need_image;

/// A root that two guests have in common, a file that one writes, and one that is cut short under it.
#[test]
fn lab_a_debian_guest_has_files_as_memory() {
    let _ = require_tool!("mmdebstrap");
    need_image();
    let body = r#"
        truncate --size=64M data.img
        mke2fs -q -F -t ext4 -b 4096 data.img
        head -c 4194305 /dev/urandom >cut.img
        truncate --size=4194816 cut.img
        guest() {
            local name=$1
            shift
            samepage run --name $name --memory 192M --kernel "$image/vmlinux" --initrd "$image/initrd.cpio" --pmem root.img,ro "$@" \
                --vsock cid=3,path=./$name.v --control ./$name.ctl --console $name.log \
                --cmdline 'console=ttyS0 quiet panic=-1 root=/dev/pmem0 rootflags=dax ro' </dev/null 2>$name.err &
            until samepage exec ./$name.v -- true 2>/dev/null; do kill -0 $! || { cat $name.err; exit 1; }; sleep 1; done
        }
        mapped() {
            python3 - $1 <<'END'
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(f"./{sys.argv[1]}.ctl")
s.sendall(b'{"op":"status","frames":true}\n')
pmem = json.loads(s.makefile().readline())["status"]["pmem"]
print(sys.argv[1], "mapped", [p["mapped_pages"] > 1000 for p in pmem[:1]], [p["read_only"] for p in pmem])
END
        }
        guest a --pmem data.img --pmem cut.img
        a=$!
        guest b
        b=$!
        samepage exec ./a.v -- grep ' / ' /proc/mounts
        for g in a b; do
            samepage exec ./$g.v -- sh -c 'cat /usr/bin/* | sha256sum' >$g.sum
            mapped $g
        done
        cmp a.sum b.sum && echo both read the same
        # As the file system has it.
        samepage exec ./a.v -- sha256sum /usr/bin/perl | cut -d' ' -f1 >perl.guest
        debugfs -R 'cat /usr/bin/perl' root.img 2>/dev/null | sha256sum | cut -d' ' -f1 >perl.host
        cmp perl.guest perl.host && echo perl is whole
        # What is written and flushed is in the file, whatever becomes of the VM.
        samepage exec ./a.v -- sh -c 'mount -t tmpfs t /mnt && mkdir /mnt/d && mount -o dax /dev/pmem1 /mnt/d && grep -c "pmem1.*dax" /proc/mounts &&
            seq 1 100000 >/mnt/d/numbers && sync && sha256sum </mnt/d/numbers' >written
        seq 1 100000 | sha256sum >expected
        tail -1 written | cmp - expected && echo the guest has written
        # A file that gets shorter: zeros, and the guest runs on.
        samepage exec ./a.v -- sh -c 'dd if=/dev/pmem2 bs=4096 skip=1000 count=1 iflag=direct 2>/dev/null | sha256sum' >before
        dd if=cut.img bs=4096 skip=1000 count=1 2>/dev/null | sha256sum | cmp - before && echo it was there
        truncate --size=1M cut.img
        samepage exec ./a.v -- sh -c 'dd if=/dev/pmem2 bs=4096 skip=900 count=1 iflag=direct 2>/dev/null | sha256sum' >after
        head -c 4096 /dev/zero | sha256sum | cmp - after && echo there are zeros
        grep 'was cut short' a.err
        kill -KILL $a
        wait $a || echo a is killed
        debugfs -R 'cat /numbers' data.img 2>/dev/null | sha256sum | cmp - expected && echo it is in the file
        samepage exec ./b.v -- poweroff || true
        wait $b && echo b has powered off
        s=0
        samepage run --pmem root.img,ro --pmem root.img --kernel "$image/vmlinux" 2>refused || s=$?
        echo "refused $s"
        grep 'is in use' refused
    "#;
    let (root, image) = (debian(), tests::lab::image_dir());
    let head = format!("{}\nln -s {} root.img\nimage={}\n", lab_head(), root.display(), image.display());
    let outcome = lab_script(Duration::from_secs(300), &(head + body)).success();
    for words in [
        "dax=always",
        "a mapped [True] [True, False, False]",
        "b mapped [True] [True]",
        "both read the same",
        "perl is whole",
        "the guest has written",
        "it was there",
        "there are zeros",
        "was cut short",
        "a is killed",
        "it is in the file",
        "b has powered off",
        "refused 1",
    ] {
        assert!(outcome.stdout.contains(words), "{words}: {outcome}");
    }
}

#[test]
fn files_that_make_no_memory_are_refused_by_name() {
    let sandbox = Sandbox::new();
    let odd = sandbox.file("odd");
    std::fs::write(&odd, [7; 1000]).expect("a file");
    let odd = odd.to_str().expect("UTF-8");
    for (files, said) in [
        (vec!["/nowhere"], "/nowhere cannot be the guest's persistent memory"),
        (vec!["/etc"], "is not a regular file or block device"),
        (vec![odd], "has 1000 bytes: expected a multiple of 512"),
        (vec!["/a", "/b", "/c", "/d", "/e"], "5 files as memory are not possible: expected at most 4"),
    ] {
        let args = files.iter().flat_map(|file| ["--pmem", file]);
        let outcome = sandbox.samepage(["run", "--console", "none"].into_iter().chain(args)).output();
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains(said), "{said}: {outcome}");
    }
}
