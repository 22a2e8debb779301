//! A VM with an API, and HTTP to it by hand: what is sent is what the test says, byte for byte.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::run::Running;
use crate::sandbox::Sandbox;
use crate::vm::{SOON, Vm};

/// `samepage run --api-sock`, started or not.
pub struct ApiVm {
    running: Running,
    pub socket: PathBuf,
    /// The control socket, which is there once the VM is started.
    pub control: PathBuf,
    /// The COM2 socket, likewise.
    pub com2: PathBuf,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    /// The head, with its status line.
    pub head: String,
    /// The JSON; null if there is no body.
    pub body: Value,
}

impl Answer {
    /// Why not.
    ///
    /// # Panics
    /// If it is no refusal.
    #[track_caller]
    pub fn fault(&self) -> &str {
        assert_eq!(self.status, 400, "{self:?}");
        self.body["fault_message"].as_str().unwrap_or_else(|| panic!("no fault_message: {self:?}"))
    }
}

impl ApiVm {
    /// Starts the process with more arguments for `samepage run`, and waits for the API's socket.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn start(sandbox: &Sandbox, args: &[impl AsRef<OsStr>]) -> Self {
        let (control, com2) = Vm::sockets(sandbox, "vm");
        let socket = sandbox.runtime_dir().join("api.sock");
        let mut all = ["run", "--console", "none"].map(OsString::from).to_vec();
        for (option, path) in [("--api-sock", &socket), ("--control", &control), ("--com2", &com2)] {
            all.extend([option.into(), path.into()]);
        }
        all.extend(args.iter().map(OsString::from));
        let running = sandbox.samepage(all).timeout(SOON * 2).start();
        Self { running, socket, control, com2 }.listening()
    }

    /// As [`Self::start`], by a link to the program that is called `firecracker`. There is no COM2, and a control socket only if the VM
    /// has a daemon.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn firecracker(sandbox: &Sandbox, args: &[impl AsRef<OsStr>], env: &[(&str, &OsStr)]) -> Self {
        let socket = sandbox.runtime_dir().join("api.sock");
        let mut all = vec![OsString::from("--api-sock"), socket.clone().into()];
        all.extend(args.iter().map(OsString::from));
        let run = env.iter().fold(sandbox.firecracker(all), |run, (key, value)| run.env(key, value));
        let control = sandbox.runtime_dir().join("api.sock.control");
        let running = run.timeout(SOON * 2).start();
        Self { running, socket, control, com2: PathBuf::new() }.listening()
    }

    #[track_caller]
    fn listening(self) -> Self {
        let vm = self;
        let until = Instant::now() + SOON;
        while UnixStream::connect(&vm.socket).is_err() {
            assert!(Instant::now() < until, "no API: {}", vm.running.stderr_so_far());
            thread::sleep(Duration::from_millis(10));
        }
        vm
    }

    /// Starts a VM of this size with the built-in guest.
    #[track_caller]
    pub fn boot(&self, mem_size_mib: u32) {
        self.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": mem_size_mib}));
        self.put("/boot-source", &json!({"kernel_image_path": "builtin"}));
        self.put("/actions", &json!({"action_type": "InstanceStart"}));
    }

    #[track_caller]
    pub fn connect(&self) -> Http {
        Http::connect(&self.socket)
    }

    /// Asks by a connection of its own.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.connect().ask(method, path, body)
    }

    /// What is there.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let answer = self.ask("GET", path, &Value::Null);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.body
    }

    /// Puts it.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) {
        let answer = self.ask("PUT", path, body);
        assert_eq!((answer.status, &answer.body), (204, &Value::Null), "{path} {body}: {answer:?}");
    }

    /// Changes it.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn patch(&self, path: &str, body: &Value) {
        let answer = self.ask("PATCH", path, body);
        assert_eq!((answer.status, &answer.body), (204, &Value::Null), "{path} {body}: {answer:?}");
    }

    #[must_use]
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Gives the process away, to wait for its end.
    #[must_use]
    pub fn into_running(self) -> Running {
        self.running
    }

    /// As a started VM with a control socket and a COM2 socket.
    #[must_use]
    #[track_caller]
    pub fn into_vm(self) -> Vm {
        Vm::of(self.running, self.control, self.com2)
    }
}

/// A connection that talks HTTP.
pub struct Http(BufReader<UnixStream>);

impl Http {
    /// To the socket at `path`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&stream, Some(SOON)).expect("a time limit of a socket");
        }
        Self(BufReader::new(stream))
    }

    /// Sends bytes. The other end may have closed the connection: its answer tells.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.0.get_mut().write_all(bytes.as_ref());
    }

    /// Whether no answer comes for a second.
    ///
    /// # Panics
    /// If the socket takes no limit.
    pub fn is_silent(&mut self) -> bool {
        self.0.get_ref().set_read_timeout(Some(Duration::from_secs(1))).expect("a time limit of a socket");
        self.0.fill_buf().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sends nothing any more.
    ///
    /// # Panics
    /// If that is not possible.
    pub fn end(&mut self) {
        self.0.get_mut().shutdown(Shutdown::Write).expect("half a connection");
    }

    /// Sends a request, with a body unless it is null, and gives the answer.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(request(method, path, &body));
        self.answer().unwrap_or_else(|| panic!("connection closed instead of an answer to {method} {path}"))
    }

    /// The next answer; None if the connection is closed.
    ///
    /// # Panics
    /// If it is no HTTP.
    #[track_caller]
    pub fn answer(&mut self) -> Option<Answer> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match self.0.read_line(&mut head) {
                Ok(0) if head.is_empty() => return None,
                Err(e) if head.is_empty() && e.kind() == io::ErrorKind::ConnectionReset => return None,
                Ok(n) if n > 0 => {}
                other => panic!("{other:?} after {head:?}"),
            }
        }
        let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status in {head:?}"));
        let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        self.0.read_exact(&mut body).expect("a whole body");
        let body = match body.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&body).expect("JSON"),
        };
        Some(Answer { status, head, body })
    }
}

/// A request as bytes.
#[must_use]
pub fn request(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
}
