//! Progress bars on standard error, where that is a terminal.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use fleet::watch::{Stage, Watch};
pub(super) use os::interrupt::{flag as interrupt_flag, is_set};
use os::print::errln;

/// Progress is shown on stderr if it is a terminal, and nowhere else.
pub(super) fn draw_target() -> ProgressDrawTarget {
    match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    }
}

/// One bar a stage; the guests' parts are added up.
#[derive(Clone)]
pub(super) struct Bars {
    all: MultiProgress,
    guests: u64,
    stages: Arc<Mutex<HashMap<Stage, Bar>>>,
}

struct Bar {
    bar: ProgressBar,
    parts: HashMap<usize, (u64, u64)>,
}

impl Bars {
    /// Bars for a fleet of `guests`.
    pub(super) fn new(guests: usize) -> Self {
        Self {
            all: MultiProgress::with_draw_target(draw_target()),
            guests: guests as u64,
            stages: Arc::default(),
        }
    }

    /// A watch that moves these bars.
    pub(super) fn watch(&self, interrupted: Arc<AtomicBool>) -> Watch {
        let bars = self.clone();
        Watch::new(move |stage, guest, done, total| bars.tell(stage, guest, done, total), interrupted)
    }

    /// Moves the bar of a stage.
    pub(super) fn tell(&self, stage: Stage, guest: usize, done: u64, total: u64) {
        if stage == Stage::Wait {
            if done < total {
                self.say(&format!(
                    "waiting for guest number {guest}, which is suspended or paused; Control-C stops, `samepage top` shows why"
                ));
            }
            return;
        }
        let mut stages = os::lock(&self.stages);
        let bar = stages.entry(stage).or_insert_with(|| Bar { bar: self.bar(stage), parts: HashMap::new() });
        let part = bar.parts.entry(guest).or_insert((0, 0));
        // "All of it" may come as (1, 1); the size is known from before then.
        *part = if done == total && part.1 > total { (part.1, part.1) } else { (done, total.max(1)) };
        let (done, total) = bar.parts.values().fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        let spread = matches!(stage, Stage::Ready | Stage::Fill | Stage::Verify);
        let unknown = if spread { self.guests.saturating_sub(bar.parts.len() as u64) } else { 0 };
        let each = total / (bar.parts.len() as u64).max(1);
        bar.bar.set_length(total + unknown * each);
        bar.bar.set_position(done);
    }

    fn bar(&self, stage: Stage) -> ProgressBar {
        let (name, unit) = match stage {
            Stage::Ready => ("start", "guests"),
            Stage::Fill => ("fill", "pages"),
            Stage::Content => ("hash", "pages"),
            Stage::Merge => ("merge", "pages"),
            Stage::Verify => ("verify in the guests", "pages"),
            Stage::Check => ("check from the host", "guests"),
            Stage::Wait => ("wait", "guests"),
            Stage::Restore => ("read", "pages"),
        };
        let template = format!("{{prefix:>20}} [{{bar:32}}] {{human_pos:>9}} / {{human_len}} {unit}");
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        self.all.add(ProgressBar::new(0)).with_style(style.progress_chars("=> ")).with_prefix(name)
    }

    /// A line above the bars, and on standard error too where that is no terminal.
    fn say(&self, line: &str) {
        if self.all.is_hidden() {
            errln!("{line}");
        } else {
            let _ = self.all.println(line);
        }
    }

    /// Takes the bars away, so that the result stands alone.
    pub(super) fn finish(&self) {
        for bar in os::lock(&self.stages).values() {
            bar.bar.finish_and_clear();
        }
        let _ = self.all.clear();
    }
}
