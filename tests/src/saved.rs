//! A VM that is saved to files and loaded from them by Firecracker's API: by a program that has it,
//! and by Samepage.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::spread::median;
use serde_json::{Value, json};

use crate::api::{Answer, Http};
use crate::run::{Run, Running};
use crate::sandbox::Sandbox;

/// How long a guest is left alone after its start, so that it has booted.
const BOOTS: Duration = Duration::from_secs(10);
/// The same of the built-in guest.
const BUILT_IN_BOOTS: Duration = Duration::from_secs(1);
/// How long a socket may take to be there.
const LIMIT: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK: Duration = Duration::from_micros(200);

/// What is saved.
pub struct Guest {
    /// A kernel and an initrd; None is Samepage's built-in guest, which no other program has.
    pub boot: Option<(PathBuf, PathBuf)>,
    pub memory_mib: u64,
}

/// What one program took, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// From the request to save until it is done.
    pub save: f64,
    /// From exec until the program says that the VM runs.
    pub running: f64,
    /// Processor time of the process by then.
    pub cpu: f64,
}

/// A program that serves the API.
struct Program<'a> {
    name: String,
    sandbox: &'a Sandbox,
    /// None is Samepage.
    path: Option<&'a Path>,
}

impl Program<'_> {
    fn start(&self, name: &str) -> Result<(Running, PathBuf)> {
        let socket = self.sandbox.file(name);
        let _ = fs::remove_file(&socket);
        let at = socket.to_str().unwrap_or_default();
        let run = match self.path {
            Some(path) => Run::program(path, ["--api-sock", at]),
            None => self.sandbox.samepage(["run", "--console", "none", "--api-sock", at]),
        };
        let (running, until) = (run.timeout(LIMIT * 4).start(), Instant::now() + LIMIT);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            ensure!(Instant::now() < until, "{} makes no socket: {}", self.name, running.stderr_so_far());
            thread::sleep(LOOK);
        }
        Ok((running, socket))
    }

    fn round(&self, guest: &Guest) -> Result<Took> {
        let [state, memory] =
            ["state", "memory"].map(|file| self.sandbox.file(&format!("{}.{file}", self.name)));
        let (running, socket) = self.start("first.sock")?;
        let mut api = Http::connect(&socket);
        let machine = json!({"vcpu_count": 1, "mem_size_mib": guest.memory_mib});
        done(&mut api, "PUT", "/machine-config", &machine)?;
        let source = match &guest.boot {
            Some((kernel, initrd)) => json!({
                "kernel_image_path": kernel, "initrd_path": initrd, "boot_args": "console=ttyS0 quiet panic=-1 reboot=k"
            }),
            None => json!({"kernel_image_path": "builtin"}),
        };
        done(&mut api, "PUT", "/boot-source", &source)?;
        done(&mut api, "PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
        thread::sleep(if guest.boot.is_some() { BOOTS } else { BUILT_IN_BOOTS });
        done(&mut api, "PATCH", "/vm", &json!({"state": "Paused"}))?;
        let began = Instant::now();
        let create = json!({"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory});
        done(&mut api, "PUT", "/snapshot/create", &create)?;
        let save = milliseconds(began);
        drop(running);

        let began = Instant::now();
        let (running, socket) = self.start("second.sock")?;
        let mut api = Http::connect(&socket);
        let load = json!({
            "snapshot_path": state, "resume_vm": true,
            "mem_backend": {"backend_type": "File", "backend_path": memory},
        });
        done(&mut api, "PUT", "/snapshot/load", &load)?;
        let state = api.ask("GET", "/", &Value::Null).body["state"].clone();
        let took = Took { save, running: milliseconds(began), cpu: cpu_ms(running.pid())? };
        ensure!(state == "Running", "{}: its VM is {state}", self.name);
        Ok(took)
    }
}

fn done(api: &mut Http, method: &str, path: &str, body: &Value) -> Result<()> {
    let Answer { status, body: said, .. } = api.ask(method, path, body);
    ensure!(status == 204, "{method} {path} {body}: {status} {said}");
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Processor time of a process, all its threads together.
fn cpu_ms(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        nanoseconds += schedstat.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(nanoseconds as f64 / 1e6)
}

/// Medians of `rounds`, of `peer` and of Samepage in turns: an object each.
///
/// # Errors
/// A program does not serve the API, or refuses.
pub fn compare(peer: &Path, guest: &Guest, rounds: usize) -> Result<Vec<Value>> {
    let sandbox = Sandbox::new();
    let name = peer.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let programs = [
        Program { name: "samepage".into(), sandbox: &sandbox, path: None },
        Program { name, sandbox: &sandbox, path: Some(peer) },
    ];
    let mut took = [const { Vec::new() }; 2];
    for _ in 0..rounds {
        for (program, took) in programs.iter().zip(&mut took) {
            took.push(program.round(guest)?);
        }
    }
    let object = |(program, took): (&Program<'_>, &Vec<Took>)| {
        let of = |number: fn(&Took) -> f64| median(took.iter().map(number));
        json!({
            "program": program.name,
            "save_ms": of(|took| took.save),
            "running_ms": of(|took| took.running),
            "cpu_ms": of(|took| took.cpu),
        })
    };
    Ok(programs.iter().zip(&took).map(object).collect())
}
