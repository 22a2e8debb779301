//! What the tests of `ksm.rs` need other processes for: `guard` puts KSM's settings back, `owner
//! DIRECTORY` merges until it is killed.

use std::error::Error;
use std::io::{Write, stdout};
use std::path::Path;
use std::thread;
use std::time::Duration;

use merge::Engine;
use merge::ksm::{Knobs, Ksm, KsmSettings, guard};

/// Longer than any test waits.
const OWNERS_LIFE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "guard"] => Ok(guard::run_on_stdin()?),
        [program, "owner", directory] => own(program, directory),
        _ => Err("expected guard, or owner and the directory of KSM's knobs (or real)".into()),
    }
}

/// Starts KSM, says so with the number of the guard, and stays.
fn own(program: &str, directory: &str) -> Result<(), Box<dyn Error>> {
    let mut ksm = Ksm::new(KsmSettings::fast()).with_guard_command(vec![program.into(), "guard".into()]);
    if directory != "real" {
        ksm = ksm.with_host(Knobs(directory.into()), Path::new(directory).join("lock"));
    }
    ksm.start(&[])?;
    writeln!(stdout(), "started {}", ksm.guard_pid().ok_or("no guard")?)?;
    thread::sleep(OWNERS_LIFE);
    Ok(())
}
