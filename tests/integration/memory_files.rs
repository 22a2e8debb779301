//! The memory file of a snapshot on disk while VMs go on from it, and memory files that belong to
//! other snapshots.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::json;
use tests::require_kvm;
use tests::vm::Client;

use super::snapshots::{Guest, VERIFIED, churn, load, loaded, with};

/// A host that dies while a snapshot is replaced leaves its memory beside the state of the one
/// before.
#[test]
fn memory_of_another_snapshot_is_refused() {
    require_kvm!();
    let (guest, mut com2) = Guest::filled(false, &[]);
    guest.pause();
    let (old_state, old_memory) = guest.create("Full", "old");
    guest.resume();
    churn(&mut com2);
    guest.pause();
    let (state, memory) = guest.create("Full", "new");
    let next = Guest::new();
    let said = "is the memory of another snapshot than the state file";
    next.refused("/snapshot/load", &load(&old_state, &memory), said);
    next.refused("/snapshot/load", &load(&state, &old_memory), said);
    // As the first of the two renames leaves it.
    fs::rename(&memory, &old_memory).expect("a rename");
    next.refused("/snapshot/load", &load(&old_state, &old_memory), said);
    // Its place and its inode do not count.
    fs::copy(&old_memory, guest.file("copy")).expect("a copy");
    next.vm.put("/snapshot/load", &with(load(&state, &guest.file("copy")), "resume_vm", true));
    assert!(loaded(&next).command("verify").contains("mismatched=0"));
    next.end();
    guest.end();
}

/// Until another process would write to the file their memory lies in it, with the frames of its
/// page cache, and writes of theirs do not.
#[test]
fn vms_of_one_memory_file_have_its_frames_in_common_until_it_is_written_to() {
    require_kvm!();
    let (first, _com2) = Guest::filled(false, &[]);
    first.pause();
    let (state, memory) = first.create("Full", "a");
    let guests = [Guest::new(), Guest::new()];
    let mapped = |guest: &Guest| {
        let pid = guest.vm.running().pid();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
        maps.contains(memory.to_str().expect("UTF-8"))
    };
    let mut com2: Vec<Client> = Vec::new();
    for guest in &guests {
        guest.vm.put("/snapshot/load", &with(load(&state, &memory), "resume_vm", true));
        com2.push(loaded(guest));
        assert!(mapped(guest));
    }
    churn(&mut com2[0]);
    for com2 in &mut com2 {
        assert!(com2.command("verify").contains("mismatched=0"));
    }
    let before = fs::read(&memory).expect("memory");
    assert!(guests.iter().all(mapped));
    // This waits until both have copied what they need.
    let file = File::options().write(true).open(&memory).expect("memory");
    assert!(!guests.iter().any(mapped));
    assert_eq!(fs::read(&memory).expect("memory"), before, "nothing of theirs is in it");
    file.set_len(0).expect("cut short");
    for com2 in &mut com2 {
        assert!(com2.command("verify").contains("mismatched=0"));
    }
    // Of a file that is open for writing there is a copy from the beginning.
    file.write_all_at(&before, 0).expect("it is as it was");
    let late = Guest::new();
    late.vm.put("/snapshot/load", &with(load(&state, &memory), "resume_vm", true));
    assert!(!mapped(&late));
    assert_eq!(loaded(&late).command("verify"), VERIFIED);
    late.end();
    guests.into_iter().for_each(Guest::end);
    first.end();
}

#[test]
fn the_file_that_a_vm_was_loaded_from_may_be_overwritten_or_cut_short() {
    require_kvm!();
    let (first, _com2) = Guest::filled(false, &[]);
    first.pause();
    let (state, memory) = first.create("Full", "a");
    let guest = Guest::new();
    guest.vm.put("/snapshot/load", &load(&state, &memory));
    File::options().write(true).open(&memory).expect("memory").set_len(0).expect("cut short");
    guest.vm.put("/snapshot/create", &json!({"snapshot_path": state, "mem_file_path": memory}));
    guest.resume();
    assert_eq!(loaded(&guest).command("verify"), VERIFIED);
    guest.end();
    let again = Guest::new();
    again.vm.put("/snapshot/load", &with(load(&state, &memory), "resume_vm", true));
    assert_eq!(loaded(&again).command("verify"), VERIFIED);
    again.end();
    first.end();
}
