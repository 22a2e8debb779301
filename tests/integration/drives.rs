//! `samepage run --drive`, fleet files and the API: which files can be drives, and whose. What a
//! guest reads from one needs Linux guests: `inside::drives`.

use std::fs;
use std::path::Path;

use serde_json::json;
use tests::api::ApiVm;
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm};

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// `samepage run` with this drive fails and says all of `expected`.
#[track_caller]
fn refused(sandbox: &Sandbox, drive: &str, expected: &[&str]) {
    fails(sandbox, drive, expected);
    sandbox.assert_clean_within(SOON);
}

/// As [`refused`], beside VMs that run.
#[track_caller]
fn fails(sandbox: &Sandbox, drive: &str, expected: &[&str]) {
    let outcome = sandbox.samepage(["run", "--console", "none", "--drive", drive]).timeout(SOON).output();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    for words in expected {
        assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
    }
}

#[test]
fn what_is_no_image_is_refused_by_name() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("image");
    for read_only in ["", ",ro"] {
        let drive = format!("{}{read_only}", path(&file));
        let _ = fs::remove_file(&file);
        refused(&sandbox, &drive, &[path(&file), "cannot be opened for reading", "No such file"]);
        fs::write(&file, "").expect("a file");
        refused(&sandbox, &drive, &[path(&file), "is empty", "512"]);
        fs::write(&file, [7; 1000]).expect("a file");
        refused(&sandbox, &drive, &[path(&file), "has 1000 bytes", "multiple of 512"]);
    }
    refused(&sandbox, path(sandbox.runtime_dir()), &["is not a regular file or block device"]);
    refused(&sandbox, "/dev/zero,ro", &["/dev/zero is not a regular file or block device"]);
    fs::write(&file, [7; 1024]).expect("a file");
    let mut five = vec!["run", "--console", "none"];
    let drive = format!("{},ro", path(&file));
    five.extend(["--drive", drive.as_str()].repeat(5));
    let outcome = sandbox.samepage(five).timeout(SOON).output();
    assert!(outcome.code == Some(1) && outcome.stderr.contains("at most 4"), "{outcome}");
}

#[test]
fn an_image_that_a_guest_may_write_is_nobody_elses() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("image");
    fs::write(&file, [7; 1024]).expect("a file");
    let read_only = format!("{},ro", path(&file));
    let readers = ["a", "b"].map(|name| Vm::start(&sandbox, name, &["--drive", &read_only]));
    let in_use = |drive: &str| {
        let outcome = sandbox.samepage(["run", "--console", "none", "--drive", drive]).timeout(SOON).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains("is in use"), "{outcome}");
    };
    in_use(path(&file));
    let stop = |vm: Vm| {
        assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
        let _ = vm.into_running().wait().success();
    };
    readers.into_iter().for_each(stop);
    let writer = Vm::start(&sandbox, "c", &["--drive", path(&file)]);
    in_use(path(&file));
    in_use(&read_only);
    stop(writer);
    sandbox.assert_clean_within(SOON);
}

#[test]
fn many_have_overlays_of_one_image() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (file, kept) = (sandbox.file("image"), sandbox.file("kept"));
    fs::write(&file, [7; 8192]).expect("a file");
    let temporary = format!("{},overlay", path(&file));
    let overlay = format!("{},overlay={}", path(&file), path(&kept));
    let mut vms: Vec<_> =
        ["a", "b"].map(|name| Vm::start(&sandbox, name, &["--drive", &temporary])).into_iter().collect();
    vms.push(Vm::start(&sandbox, "c", &["--drive", &overlay]));
    fails(&sandbox, &overlay, &[path(&kept), "is in use"]);
    fails(&sandbox, path(&file), &[path(&file), "is in use"]);
    fails(&sandbox, &format!("{},ro,overlay", path(&file)), &["`ro` and `overlay`"]);
    for vm in vms {
        assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
        assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
        let _ = vm.into_running().wait().success();
    }
    // Another file is no overlay, and stays as it is.
    fs::write(&kept, [8; 8192]).expect("a file");
    refused(&sandbox, &overlay, &[path(&kept), "cannot be the overlay of", "was made as one"]);
    assert_eq!(fs::read(&kept).expect("a file"), [8; 8192]);
    assert_eq!(fs::read(&file).expect("a file"), [7; 8192]);
}

#[test]
fn a_drive_gets_another_file_by_the_api() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (file, other) = (sandbox.file("image"), sandbox.file("other"));
    fs::write(&file, [7; 2048]).expect("a file");
    let vm = ApiVm::start(&sandbox, &[] as &[&str]);
    let patch = |path: &Path| json!({"drive_id": "data", "path_on_host": path});
    let drive =
        json!({"drive_id": "data", "path_on_host": file, "is_root_device": false, "is_read_only": false});
    vm.put("/drives/data", &drive);
    let early = vm.ask("PATCH", "/drives/data", &patch(&other));
    assert!(early.fault().contains("not supported before starting"), "{early:?}");
    vm.put("/boot-source", &json!({"kernel_image_path": "builtin"}));
    vm.put("/actions", &json!({"action_type": "InstanceStart"}));
    let missing = vm.ask("PATCH", "/drives/data", &patch(&other));
    assert!(missing.fault().contains("cannot be opened"), "{missing:?}");
    assert_eq!(vm.get("/vm/config")["drives"][0]["path_on_host"], json!(file), "as it was");
    // Smaller, and then the same file again, longer.
    fs::write(&other, [8; 512]).expect("a file");
    vm.patch("/drives/data", &patch(&other));
    fs::write(&other, [8; 4096]).expect("a file");
    vm.patch("/drives/data", &patch(&other));
    assert_eq!(vm.get("/vm/config")["drives"][0]["path_on_host"], json!(other));
    // The first is free, and the second is not.
    let user = Vm::start(&sandbox, "a", &["--drive", path(&file)]);
    fails(&sandbox, path(&other), &["is in use"]);
    let unknown = vm.ask("PATCH", "/drives/none", &json!({"drive_id": "none", "path_on_host": other}));
    assert!(unknown.fault().contains("there is no drive \"none\": expected data"), "{unknown:?}");
    assert_eq!(user.ask(&json!({"op": "stop"})), json!("done"));
    let _ = user.into_running().wait().success();
    vm.running().kill(rustix::process::Signal::TERM);
    let _ = vm.into_running().wait().success();
}

#[test]
fn a_guest_without_use_for_it_has_a_drive_by_the_api() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("image");
    fs::write(&file, [7; 1024]).expect("a file");
    let vm = ApiVm::start(&sandbox, &[] as &[&str]);
    let drive =
        json!({"drive_id": "data", "path_on_host": file, "is_root_device": false, "is_read_only": true});
    vm.put("/drives/data", &drive);
    assert_eq!(vm.get("/vm/config")["drives"], json!([drive]));
    let wrong = vm.ask("PUT", "/drives/other", &drive);
    assert!(wrong.fault().contains("does not match the id from the body"), "{wrong:?}");
    vm.put("/boot-source", &json!({"kernel_image_path": "builtin"}));
    // Gone meanwhile: the start fails, and can be tried again.
    let aside = sandbox.file("aside");
    fs::rename(&file, &aside).expect("a file that was there");
    let start = json!({"action_type": "InstanceStart"});
    let failed = vm.ask("PUT", "/actions", &start);
    assert!(failed.fault().contains("cannot be opened for reading"), "{failed:?}");
    fs::rename(&aside, &file).expect("a file that was there");
    vm.put("/actions", &start);
    let late = vm.ask("PUT", "/drives/data", &drive);
    assert!(late.fault().contains("not supported after starting"), "{late:?}");
    vm.running().kill(rustix::process::Signal::TERM);
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}
