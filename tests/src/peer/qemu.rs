//! A guest under `qemu-system-x86_64 -M microvm`, with the balloon that QEMU has for it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Agent, Balloon, LIMIT, Linux, Process};

/// QEMU's microvm with what an ACPI guest needs and nothing else.
pub const MICROVM: &str = "microvm,x-option-roms=off,isa-serial=on,acpi=on";

pub struct Qemu {
    process: Process,
    monitor: BufReader<UnixStream>,
    agent: Agent,
    memory_bytes: u64,
}

impl Qemu {
    /// Boots the guest, with its monitor's socket in `dir`.
    ///
    /// # Errors
    /// It does not get as far as its agent.
    pub fn start(linux: &Linux<'_>, dir: &Path) -> Result<Self> {
        let socket = dir.join("qemu.qmp");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", MICROVM, "-cpu", "host", "-enable-kvm", "-smp", "1"]);
        command.args(["-m", &linux.memory_mib.to_string(), "-nodefaults", "-no-user-config", "-no-reboot"]);
        // With one serial port only, the agent talks on it.
        command.args([
            "-name",
            "peer,debug-threads=on",
            "-nographic",
            "-serial",
            "stdio",
            "-device",
            "virtio-balloon-device",
        ]);
        command.arg("-qmp").arg(format!("unix:{},server,nowait", socket.display()));
        command.args(["-append", &linux.cmdline()]);
        command.arg("-kernel").arg(linux.kernel).arg("-initrd").arg(linux.initrd);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut process = Process(command.spawn().context("cannot start qemu-system-x86_64")?);
        let input = process.0.stdin.take().context("no stdin")?;
        let output = process.0.stdout.take().context("no stdout")?;
        let mut agent = Agent::new(input, output);
        agent.wait("ready", |line| line.starts_with("ready "))?;
        let until = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > until => return Err(e).context("no monitor socket"),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let memory_bytes = linux.memory_mib << 20;
        let mut qemu = Self { process, monitor: BufReader::new(stream), agent, memory_bytes };
        qemu.ask("qmp_capabilities", &json!({}))?;
        Ok(qemu)
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.monitor.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut line = String::new();
            if self.monitor.read_line(&mut line)? == 0 {
                bail!("QEMU's monitor closed the connection after {command}");
            }
            // The greeting and events come in between.
            let mut answer: Value = serde_json::from_str(&line)?;
            if answer.get("error").is_some() {
                bail!("{command}: {answer}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }
}

impl Balloon for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn set_target(&mut self, bytes: u64) -> Result<()> {
        // QEMU's target is what is left to the guest.
        self.ask("balloon", &json!({"value": self.memory_bytes - bytes})).map(|_| ())
    }

    fn actual(&mut self) -> Result<u64> {
        let left = self.ask("query-balloon", &json!({}))?;
        Ok(self.memory_bytes - left["actual"].as_u64().with_context(|| left.to_string())?)
    }

    fn agent(&mut self) -> &mut Agent {
        &mut self.agent
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.starts_with("CPU ")
    }
}
