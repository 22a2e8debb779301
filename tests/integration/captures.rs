//! A VM that is captured, and the keeper of its image: one that takes its time, and one that goes
//! away.

use std::os::fd::AsFd;
use std::path::PathBuf;

use machine::capture::link::{Ask, Link, socket};
use rustix::net::{SocketAddrUnix, SocketFlags, accept_with};
use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm};

/// Where a keeper listens.
struct Listener {
    socket: std::os::fd::OwnedFd,
    path: PathBuf,
}

impl Listener {
    fn new(sandbox: &Sandbox) -> Self {
        let (socket, path) = (socket().expect("a socket"), sandbox.file("keeper.sock"));
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("a path")).expect("it is bound");
        rustix::net::listen(&socket, 4).expect("it listens");
        Self { socket, path }
    }

    fn request(&self) -> Value {
        json!({"op": "capture", "socket": self.path})
    }

    /// The VM, once it has asked for its first slab: it copies its memory.
    fn accept(&self) -> Link {
        let accepted = accept_with(self.socket.as_fd(), SocketFlags::CLOEXEC).expect("the VM connects");
        let link = Link::new(accepted, SOON).expect("a link");
        let (ask, _) = link.receive::<Ask>().expect("a question");
        assert!(matches!(ask, Ask::Draft(1..)), "{ask:?}");
        link
    }
}

fn send(client: &mut Client, request: &Value) {
    client.send(format!("{request}\n").as_bytes());
}

/// No time is measured here: the VM cannot go on with the capture before its keeper has answered,
/// and answers others all the same.
#[test]
fn a_vm_serves_others_while_its_memory_is_copied() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "32M"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
    let filled = com2.command("fill seed=1 common=7 zero=10 common_pct=40 dup=10 unique=40 pages=5000");
    assert!(filled.starts_with("ok "), "{filled}");
    let listener = Listener::new(&sandbox);
    let (control, _) = Vm::sockets(&sandbox, "vm");
    let mut daemon = Client::connect(&control);
    send(&mut daemon, &listener.request());
    let keeper = listener.accept();
    // What the same client asks is answered in its turn, others' requests are now.
    send(&mut daemon, &json!({"op": "status"}));
    for _ in 0..3 {
        assert_eq!(vm.status()["paused"], false);
        assert_eq!(vm.ask(&json!({"op": "pause"})), "done");
        assert_eq!(vm.status()["paused"], true);
        assert_eq!(vm.ask(&json!({"op": "resume"})), "done");
        assert!(vm.ask(&json!({"op": "balloon"}))["balloon"].is_object());
    }
    assert!(com2.command("verify").contains("mismatched=0"));
    // The keeper goes away: that is the answer, and then the next one comes.
    drop(keeper);
    let refused = daemon.line().expect("an answer");
    assert!(refused.contains("cannot make a slab"), "{refused}");
    let status = daemon.line().expect("another");
    assert!(status.contains(r#""paused":false"#), "{status}");
    // A client that does not wait for the answer is gone, and nothing else is.
    send(&mut daemon, &listener.request());
    let keeper = listener.accept();
    drop(daemon);
    assert_eq!(vm.status()["paused"], false);
    drop(keeper);
    assert!(com2.command("verify").contains("mismatched=0"));
    // Two at once: each has its own.
    let mut both = [Client::connect(&control), Client::connect(&control)];
    both.iter_mut().for_each(|client| send(client, &listener.request()));
    let keepers = [listener.accept(), listener.accept()];
    drop(keepers);
    for client in &mut both {
        let refused = client.line().expect("an answer");
        assert!(refused.contains("cannot make a slab"), "{refused}");
    }
    assert_eq!(vm.ask(&json!({"op": "stop"})), "done");
    assert_eq!(vm.into_running().wait().success().stderr, "");
    sandbox.assert_clean_within(SOON);
}
