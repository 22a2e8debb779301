//! `samepage top`: a fleet's memory, live on a terminal, or once as a table.

mod class_bar;
mod columns;
mod draw;
mod keys;
mod plain;
mod screen;
mod state;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use self::keys::{Input, Keys, Pressed};
use self::screen::Screen;
use self::state::{Sort, Top};
use super::which::WhichFleet;
use fleet::HostError;
use fleet::daemon_client::{request, unexpected};
use fleet::living::choose;
use fleet::management::Management;
use fleet::status::{Reply, Request};
use os::one_line;
use os::print::{errln, outln};
use os::signals;
use os::terminal::{Holder, holder};

/// Time limit of the daemon, which answers at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Poll interval for signals, answers and the clock while no key is pressed.
const POLL: Duration = Duration::from_millis(50);
/// Redraw interval without new data.
const REDRAW: Duration = Duration::from_secs(1);
/// How long `--once` waits for the first ledger of a new daemon, and how often it asks.
const FIRST_LEDGER: (Duration, Duration) = (Duration::from_secs(3), Duration::from_millis(100));
/// Least and most seconds between two looks.
const INTERVALS: (f64, f64) = (0.1, 3600.0);

/// Watch a fleet's memory: use, debt, and the policy's actions
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage top
  samepage top builtin --sort frames --interval 0.5
  samepage top --once                          a table, for a pipe or a log
  samepage top --json | jq .ledger.debt        everything that is known, as one JSON object

Keys: s sorts by the next key, r the other way round, p holds the display, ? lists all keys, q quits. It needs a
terminal of 80 columns and 24 lines; without a terminal it prints a table, as with --once. NO_COLOR=1 does without
colours.")]
pub(super) struct Args {
    #[command(flatten)]
    which: WhichFleet,
    /// Print a table and end
    #[arg(long)]
    once: bool,
    /// Print one JSON object and end
    #[arg(long)]
    json: bool,
    /// Interval between looks, 0.1 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: f64,
    /// Sort guests by this
    #[arg(long, value_name = "KEY", value_enum, default_value = "name")]
    sort: Sort,
}

fn interval(text: &str) -> Result<f64, String> {
    let (least, most) = INTERVALS;
    match text.parse() {
        Ok(seconds) if (least..=most).contains(&seconds) => Ok(seconds),
        _ => Err(format!("expected {least} to {most} seconds")),
    }
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let fleet = choose(args.which.name()?)?;
    let terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    if args.once || args.json {
        return once(&fleet, args.json, args.sort);
    }
    if !terminal {
        errln!("note: standard input or output is not a terminal, so this is `samepage top --once`");
        return once(&fleet, false, args.sort);
    }
    if holder() == Holder::Others {
        // Taking the terminal from the background would stop this process, and only SIGKILL would
        // end it.
        errln!("note: in the background of its terminal, so this is `samepage top --once`");
        return once(&fleet, false, args.sort);
    }
    watch(fleet, args.sort, Duration::from_secs_f64(args.interval))
}

/// What the daemon knows now.
fn look(fleet: &str) -> Result<Management, HostError> {
    match request(fleet, &Request::Management, ANSWER_LIMIT)? {
        Reply::Management(management) => Ok(*management),
        other => Err(unexpected(&other)),
    }
}

fn once(fleet: &str, json: bool, sort: Sort) -> anyhow::Result<ExitCode> {
    let begin = Instant::now();
    let (limit, interval) = FIRST_LEDGER;
    let management = loop {
        let management = look(fleet)?;
        if management.ledger.is_some() || begin.elapsed() > limit {
            break management;
        }
        thread::sleep(interval);
    };
    match json {
        true => outln!("{}", serde_json::to_string(&management)?)?,
        false => outln!("{}", plain::text(fleet, &management, sort))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The result of a look: everything, or the reason why not.
type Look = Result<Management, String>;

fn watch(fleet: String, sort: Sort, interval: Duration) -> anyhow::Result<ExitCode> {
    let signalled = Arc::new(AtomicUsize::new(0));
    // Before the terminal is changed. One signal is enough: this loop never blocks.
    for signal in signals::ending() {
        signal_hook::flag::register_usize(signal, signalled.clone(), signal as usize)
            .context("cannot watch for signals")?;
    }
    let (sender, looks) = sync_channel(1);
    let asked = fleet.clone();
    thread::Builder::new()
        .name("looks".into())
        .spawn(move || keep_looking(&asked, interval, &sender))
        .context("cannot start the thread that asks the daemon")?;
    let mut screen = Screen::open().context("cannot draw on this terminal")?;
    let result = show(&mut screen, Top::new(fleet, sort), &looks, &signalled);
    drop(screen);
    match (signalled.load(Ordering::Relaxed), result) {
        (0, Ok(Ended::ByKey)) => {}
        (0, Ok(Ended::WithoutTerminal)) => errln!("note: ended: its terminal is gone"),
        (0, Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
            errln!("note: ended: its terminal is gone");
        }
        (0, Err(error)) => return Err(error).context("cannot draw on this terminal any more"),
        // The terminal may be gone, which is why the signal came.
        (signal, _) => errln!("note: ended by {}", signals::name(signal as i32)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Why drawing ended.
enum Ended {
    /// By q or a signal.
    ByKey,
    /// The terminal is gone.
    WithoutTerminal,
}

/// Asks the daemon until the receiver is gone.
fn keep_looking(fleet: &str, interval: Duration, sender: &SyncSender<Look>) {
    loop {
        let answer = look(fleet).map_err(|error| match error {
            HostError::NoDaemon { .. } => "the daemon is gone".to_owned(),
            other => one_line(&other),
        });
        if sender.send(answer).is_err() {
            return;
        }
        thread::sleep(interval);
    }
}

/// Draws each answer until a key, a signal or the terminal ends it.
fn show(
    screen: &mut Screen,
    mut top: Top,
    looks: &Receiver<Look>,
    signalled: &AtomicUsize,
) -> io::Result<Ended> {
    let begin = Instant::now();
    let (mut keys, mut drawn) = (Keys::default(), None::<Instant>);
    let mut size = screen.size();
    while signalled.load(Ordering::Relaxed) == 0 {
        let mut changed = drawn.is_none_or(|at| at.elapsed() >= REDRAW);
        for answer in looks.try_iter() {
            changed = true;
            match answer {
                Ok(management) => top.saw(management),
                Err(why) => top.missed(why, begin.elapsed().as_secs_f64()),
            }
        }
        let now = screen.size();
        if changed || now != size {
            size = now;
            screen.draw(|frame| draw::draw(frame, &top, begin.elapsed().as_secs_f64()))?;
            drawn = Some(Instant::now());
        }
        let mut quit = false;
        let input = keys.wait(POLL, |pressed| match pressed {
            Pressed::Quit => quit = true,
            Pressed::Key(key) => {
                top.press(key);
                drawn = None;
            }
        })?;
        match (quit, input) {
            (true, _) => return Ok(Ended::ByKey),
            (_, Input::Gone) => return Ok(Ended::WithoutTerminal),
            _ => {}
        }
    }
    Ok(Ended::ByKey)
}
