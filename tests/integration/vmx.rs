//! In the lab with an Intel processor, VMX and EPT, of which there is one: what is shown on SVM and
//! NPT holds there, too.

use std::time::Duration;

use tests::lab::lab_vmx_script;
use tests::samepage;

use super::demo::check_report;
use super::power::need_guest;

/// Bochs runs some hundred million instructions a second, and fewer where others want the
/// processor.
const LIMIT: Duration = Duration::from_secs(1500);

#[test]
fn lab_vmx_the_demo_merges_with_both_engines_and_loses_nothing() {
    let samepage = samepage();
    let script = format!(
        "for engine in slab ksm; do {0} demo --engine $engine --json; done\n{0} doctor >&2",
        samepage.display()
    );
    let outcome = lab_vmx_script(LIMIT, &[samepage], &script).success();
    let reports: Vec<serde_json::Value> = outcome
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {outcome}")))
        .collect();
    let [slab, ksm] = &reports[..] else { panic!("two reports: {outcome}") };
    for (report, engine) in [(slab, "slab"), (ksm, "ksm")] {
        assert_eq!((&report["engine"], &report["backend"]), (&engine.into(), &"vmx+ept".into()), "{outcome}");
        check_report(report, 4.0);
    }
    assert!(outcome.stderr.contains("Guests run here (vmx+ept)"), "{outcome}");
}

/// A guest that is captured there goes on three times, each with a generation of its own before it
/// answers.
#[test]
fn lab_vmx_clones_go_on() {
    let samepage = samepage();
    let script = format!("{} demo --clones 3 --memory 32M --json", samepage.display());
    let outcome = lab_vmx_script(LIMIT, &[samepage], &script).success();
    let report = outcome.json();
    assert_eq!((&report["backend"], &report["clones"]), (&"vmx+ept".into(), &3.into()), "{outcome}");
    assert_eq!(report["mismatched_pages"], 0, "{outcome}");
    assert!(report["verified_pages"].as_u64() > Some(4 * 5000), "{outcome}");
    assert!(report["captured"]["copied_pages"].as_u64() > Some(5000), "{outcome}");
}

/// The reset paths differ from SVM's: a triple fault, the keyboard controller and ACPI leave the
/// guest by other exits.
#[test]
fn lab_vmx_whatever_ends_a_debian_guest_ends_its_vm() {
    let (samepage, image) = (samepage(), need_guest());
    let cases = [("poweroff", "panic=-1", 0), ("reboot", "panic=-1", 0), ("sysrq-c", "panic=-1", 1)];
    let mut script = String::new();
    for (does, line, _) in cases {
        script += &format!(
            "s=0; {0} run --memory 256M --kernel {1}/vmlinux --initrd {1}/guest.cpio \
             --cmdline 'console=ttyS0 quiet {line} do={does}' >/tmp/out 2>&1 || s=$?\n\
             echo \"status $s\"; tail -n 4 /tmp/out >&2\n",
            samepage.display(),
            image.display()
        );
    }
    let files = [samepage, image.join("vmlinux"), image.join("guest.cpio")];
    let outcome = lab_vmx_script(LIMIT, &files, &script).success();
    let found: Vec<_> = outcome.stdout.lines().filter_map(|line| line.strip_prefix("status ")).collect();
    assert_eq!(found, cases.map(|(_, _, status)| status.to_string()), "{outcome}");
    assert!(outcome.stderr.contains("the guest's kernel panicked: sysrq triggered crash"), "{outcome}");
}
