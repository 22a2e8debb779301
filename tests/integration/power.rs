//! How guests end: by themselves, by their power button, and when they are asked to.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::json;
use tests::lab::lab_script;
use tests::require_kvm;
use tests::run::Run;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm};

use super::kernels::{Elf, PANIC, PCI_RESET};

/// A VM of the built-in guest that has said that it is ready.
fn built_in(sandbox: &Sandbox) -> Vm {
    let vm = Vm::start(sandbox, "vm", &["--memory", "32M"]);
    let line = vm.com2().line().expect("the ready line");
    assert!(line.starts_with("ready "), "{line}");
    vm
}

#[test]
fn a_guest_that_says_that_it_panicked_has_failed() {
    require_kvm!();
    let sandbox = Sandbox::new();
    for (code, status, said) in [(PANIC, 1, "the guest's kernel panicked"), (PCI_RESET, 0, "")] {
        let kernel = Elf::with(code).write(&sandbox, "kernel");
        let kernel = kernel.to_str().expect("a path in UTF-8");
        let args = ["run", "--console", "none", "--memory", "32M", "--kernel", kernel];
        let outcome = sandbox.samepage(args).output();
        assert_eq!(outcome.code, Some(status), "{outcome}");
        assert!(outcome.stderr.contains(said), "{outcome}");
        sandbox.assert_clean_within(SOON);
    }
}

#[test]
fn a_guest_powers_off_when_it_is_asked_to() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = built_in(&sandbox);
    // Paused it could not.
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    let control = vm.control.to_str().expect("UTF-8").to_owned();
    let outcome = sandbox.samepage(["power", "off", &control]).output().success();
    assert!(outcome.stdout.contains("has powered off"), "{outcome}");
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_guest_that_does_not_power_off_is_cut_off_and_its_vm_says_so() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = built_in(&sandbox);
    // It has no driver for its power button, and nothing asks it on COM2.
    assert_eq!(vm.ask(&json!({"op": "power_button"})), json!({"power_button": {"driver": false}}));
    assert_eq!(vm.ask(&json!({"op": "shut_down", "timeout_seconds": 1})), json!("done"));
    let outcome = vm.into_running().wait();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("asked to power off, had not after 1 s"), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_guest_without_a_driver_for_its_button_is_named() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = built_in(&sandbox);
    let outcome = sandbox.samepage(["power", "button", vm.control.to_str().expect("UTF-8")]).output();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("has no driver for it"), "{outcome}");
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    let _ = vm.into_running().wait().success();
}

static IMAGE: Mutex<()> = Mutex::new(());

/// The directory of a kernel and of an initramfs with busybox, for guests in the lab, made again
/// when what is in it may have changed.
pub(super) fn need_guest() -> PathBuf {
    // The test that comes second finds it made.
    let _alone = os::lock(&IMAGE);
    let image = tests::lab::image_dir().with_file_name("busybox");
    let made = image.join("guest.cpio");
    let modified = |path: &PathBuf| path.metadata().and_then(|m| m.modified()).ok();
    let sources = [tests::samepage(), tests::workspace().join("tests/guest-image")];
    if sources.iter().any(|source| modified(&made) <= modified(source)) {
        // It is not part of an image, and an image is made anew only where nothing else is.
        let _ = std::fs::remove_file(&made);
        let out = image.to_str().expect("UTF-8");
        let args = ["image", "--out", out, "--module", "button", "--module", "evdev"];
        let limit = Duration::from_secs(300);
        let _ = Run::program(tests::samepage(), args).timeout(limit).output().success();
        let args = [image.clone(), made];
        let program = tests::workspace().join("tests/guest-image");
        let _ = Run::program(program, args).timeout(limit).output().success();
    }
    image
}

/// Runs a script in the lab with $samepage, $image, and a function that boots a guest.
fn lab(seconds: u64, script: &str) -> tests::run::Outcome {
    let image = need_guest();
    let head = format!("samepage={} image={}", tests::samepage().display(), image.display());
    let functions = r#"
        boot() { "$samepage" run --memory 256M --kernel "$image/vmlinux" "$@"; }
    "#;
    lab_script(Duration::from_secs(seconds), &format!("{head}\n{functions}\n{script}"))
}

/// Each way in which Debian's kernel can end, with the default command line and with others: it
/// ends the VM, and with the status that the documentation has.
#[test]
fn lab_whatever_ends_a_debian_guest_ends_its_vm() {
    let cases = [
        ("reboot", "panic=-1", 0),
        ("poweroff", "panic=-1", 0),
        ("sysrq-b", "panic=-1", 0),
        ("sysrq-c", "panic=-1", 1),
        ("sysrq-c", "panic=1", 1),
        // Linux's own default: it would hang for ever, and reports on the panic port.
        ("sysrq-c", "panic=0", 1),
        ("reboot", "reboot=bios", 0),
        ("reboot", "reboot=kbd", 0),
        ("reboot", "reboot=pci", 0),
        ("poweroff", "noapic", 0),
        ("reboot", "noapic reboot=k panic=1 pci=off nomodules", 0),
    ];
    let mut script = String::new();
    for (does, line, _) in cases {
        script += &format!(
            "boot --initrd \"$image/guest.cpio\" --cmdline 'console=ttyS0 quiet {line} do={does}' >/tmp/out 2>&1 && s=0 || s=$?\n\
             echo \"status $s\"; tail -n 4 /tmp/out >&2; grep -q 'PCI: Fatal' /tmp/out && echo 'PCI: Fatal with {line}' || true\n"
        );
    }
    // Too early for any module, with the default command line.
    script += "boot --console none >/tmp/out 2>&1 && s=0 || s=$?\necho \"status $s\"; cat /tmp/out >&2\n\
               grep 'the guest.s kernel panicked: VFS: Unable to mount root fs' /tmp/out\n";
    let outcome = lab(400, &script).success();
    let found: Vec<_> = outcome.stdout.lines().filter_map(|line| line.strip_prefix("status ")).collect();
    let wanted: Vec<_> = cases.iter().map(|(_, _, status)| status.to_string()).chain(["1".into()]).collect();
    assert_eq!(found, wanted, "{outcome}");
    let fatal: Vec<_> = outcome.stdout.lines().filter(|line| line.starts_with("PCI: Fatal")).collect();
    assert!(fatal.iter().all(|line| line.contains("pci=off")), "{fatal:?}: {outcome}");
    let said = outcome.stderr.matches("the guest's kernel panicked: sysrq triggered crash").count();
    assert_eq!(said, 3, "{outcome}");
}

/// A guest with acpid powers off when its button is pressed.
#[test]
fn lab_the_power_button_of_a_debian_guest() {
    let script = r#"
        boot --initrd "$image/guest.cpio" --control /tmp/vm.sock --console /tmp/log \
            --cmdline 'console=ttyS0 quiet panic=-1 do=button' &
        vm=$!
        for n in $(seq 600); do
            if grep -q 'guest: button' /tmp/log; then break; fi
            sleep 0.1
        done
        # Until acpid listens a press may be too early.
        for n in $(seq 100); do
            "$samepage" power button /tmp/vm.sock || true
            sleep 1
            kill -0 $vm || break
        done
        wait $vm && echo "ended with 0"
        cat /tmp/log >&2
        grep 'reboot: Power down' /tmp/log
    "#;
    let outcome = lab(120, script).success();
    assert!(
        outcome.stdout.contains("vm.sock: pressed") && outcome.stdout.contains("ended with 0"),
        "{outcome}"
    );
}

/// Asked before its driver of COM2 is up, a guest loses the line. It is said again.
#[test]
fn lab_a_guest_that_is_still_starting_powers_off_when_asked() {
    let script = r#"
        boot --initrd "$image/initrd.cpio" --control /tmp/vm.sock --console /tmp/log &
        vm=$!
        for n in $(seq 600); do
            if [ -S /tmp/vm.sock ]; then break; fi
            sleep 0.1
        done
        "$samepage" power off /tmp/vm.sock --timeout 100
        wait $vm && echo "ended with 0"
        cat /tmp/log >&2
    "#;
    let outcome = lab(150, script).success();
    assert!(outcome.stdout.contains("ended with 0"), "{outcome}");
}

/// Two guests that write to their drives: both file systems are clean after `fleet down`. One that
/// cannot be moved to end is cut off and named.
#[test]
fn lab_a_fleet_goes_down_in_good_order() {
    let script = r#"
        fleet() {
            for n in a b; do truncate -s 64M "/tmp/$n.img"; mke2fs -q -F -t ext4 "/tmp/$n.img"; done
            cat >/tmp/fleet.toml <<END
name = "two"
engine = "off"
[defaults]
memory = "192M"
kernel = "$image/vmlinux"
initrd = "$image/guest.cpio"
[[guest]]
name = "a"
cmdline = "console=ttyS0 quiet panic=-1 do=serve"
drives = [{ path = "/tmp/a.img" }]
[[guest]]
name = "b"
cmdline = "console=ttyS0 quiet panic=-1 do=$1"
drives = [{ path = "/tmp/b.img" }]
END
            "$samepage" fleet up /tmp/fleet.toml >&2
        }
        fleet serve
        time "$samepage" fleet down --timeout 120
        e2fsck -fn /tmp/a.img && e2fsck -fn /tmp/b.img && echo "both are clean"
        fleet stubborn
        "$samepage" fleet down --timeout 15 && s=0 || s=$?
        echo "status $s"
        e2fsck -fn /tmp/a.img && echo "a is clean"
        fleet stubborn
        "$samepage" fleet down --now && echo "now"
        fleet serve
        # The daemon itself, by a signal.
        daemon=$("$samepage" fleet status --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["pid"])')
        kill -TERM "$daemon"
        for n in $(seq 600); do kill -0 "$daemon" 2>&- || break; sleep 0.1; done
        e2fsck -fn /tmp/a.img && e2fsck -fn /tmp/b.img && echo "clean after SIGTERM"
        if pgrep -x samepage >&2; then exit 1; fi
    "#;
    let outcome = lab(500, script).success();
    for said in ["both are clean", "status 1", "a is clean", "now", "clean after SIGTERM"] {
        assert!(outcome.stdout.lines().any(|line| line == said), "{said}: {outcome}");
    }
    assert!(outcome.stderr.contains("b: it did not power off within 15 s"), "{outcome}");
}
