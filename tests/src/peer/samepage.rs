//! A guest under `samepage run`.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Agent, Balloon, LIMIT, Linux, Process};
use crate::vm::Client;

pub struct Samepage {
    process: Process,
    control: Client,
    agent: Agent,
}

impl Samepage {
    /// Boots the guest, with its sockets in `dir`.
    ///
    /// # Errors
    /// It does not get as far as its agent.
    pub fn start(linux: &Linux<'_>, dir: &Path) -> Result<Self> {
        let (control, com2) = (dir.join("samepage.ctl"), dir.join("samepage.com2"));
        let mut command = Command::new(crate::samepage());
        command.args(["run", "--console", "none", "--cmdline", &linux.cmdline()]);
        command.args(["--memory", &format!("{}M", linux.memory_mib)]);
        command.arg("--kernel").arg(linux.kernel).arg("--initrd").arg(linux.initrd);
        command.arg("--control").arg(&control).arg("--com2").arg(&com2);
        let child = command.stdin(Stdio::null()).process_group(0).spawn().context("cannot start samepage")?;
        let process = Process(child);
        let until = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&com2) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > until => return Err(e).context("no COM2 socket"),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut agent = Agent::new(stream.try_clone()?, stream);
        agent.wait("ready", |line| line.starts_with("ready "))?;
        Ok(Self { process, control: Client::connect(&control), agent })
    }

    fn ask(&mut self, request: &Value) -> Value {
        self.control.ask(request)
    }
}

impl Balloon for Samepage {
    fn name(&self) -> &'static str {
        "samepage"
    }

    fn set_target(&mut self, bytes: u64) -> Result<()> {
        let answer = self.ask(&json!({"op": "balloon_target", "pages": bytes / 4096}));
        anyhow::ensure!(answer == json!("done"), "{answer}");
        Ok(())
    }

    fn actual(&mut self) -> Result<u64> {
        let answer = self.ask(&json!({"op": "balloon_size"}));
        let pages = answer["balloon_size"]["actual_pages"].as_u64().with_context(|| answer.to_string())?;
        Ok(pages * 4096)
    }

    fn agent(&mut self) -> &mut Agent {
        &mut self.agent
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.starts_with("vcpu")
    }
}
