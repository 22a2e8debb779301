//! Tortures merging by slabs until many pages are checked; see [`tests::torture`].

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tests::torture::{self, Options};

const USAGE: &str = "\
Tortures merging by slabs: guests fill, rewrite, check, free and balloon all of their memory, while its pages are
merged and written to, and the engine and guests are killed. Ends with status 1 if a page holds something else than it
should, or a guest or the engine ends by itself.

Usage: torture [--pages N] [--seed N] [--guests N] [--memory MIB] [--hash-mask N] [--sampling MS] [--clones] [--minutes N] [--json]

  --pages N      pages to check, all guests together [default: 10000000]
  --seed N       seed of all choices [default: from the clock, and printed]
  --guests N     built-in guests [default: 4]
  --memory MIB   RAM of each [default: 48]
  --hash-mask N  the bits of pages' hashes that count: 0 and all pages collide [default: all]
  --sampling MS  sample each guest's working set, 1000 pages every MS milliseconds [default: not]
  --clones       capture guests while they work, and have clones in the places of guests that are killed
  --minutes N    fail if it is not done by then [default: 60]
  --json         print one JSON object

10 million pages take 8 minutes on two processors; one million in the lab takes 15.";

fn main() -> Result<ExitCode> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|arg| arg == torture::ENGINE).is_some() {
        let (Some(socket), Some(hash_mask)) = (args.next(), args.next()) else {
            bail!("the engine needs a socket and a mask");
        };
        torture::serve(socket.into(), hash_mask.parse()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let mut options = Options {
        seed: clock.as_secs(),
        guests: 4,
        memory_mib: 48,
        pages: 10_000_000,
        hash_mask: u64::MAX,
        sampling: None,
        clones: false,
        limit: Duration::from_secs(60 * 60),
        program: std::env::current_exe()?,
    };
    let mut as_json = false;
    while let Some(arg) = args.next() {
        let mut value = || -> Result<u64> {
            let value = args.next().with_context(|| format!("{arg} needs a number"))?;
            value.parse().with_context(|| format!("{arg} takes a number, not {value:?}"))
        };
        match arg.as_str() {
            "--pages" => options.pages = value()?,
            "--seed" => options.seed = value()?,
            "--guests" => options.guests = value()? as usize,
            "--memory" => options.memory_mib = value()?,
            "--hash-mask" => options.hash_mask = value()?,
            "--sampling" => options.sampling = Some(Duration::from_millis(value()?)),
            "--clones" => options.clones = true,
            "--minutes" => options.limit = Duration::from_secs(60 * value()?),
            "--json" => as_json = true,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            other => bail!("unknown argument {other}\n\n{USAGE}"),
        }
    }
    eprintln!("seed {}", options.seed);
    let bar = ProgressBar::new(options.pages).with_style(
        ProgressStyle::with_template("{elapsed_precise} {wide_bar} {human_pos} of {human_len} pages")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let tally = torture::run(&options, &|checked| bar.inc(checked))?;
    bar.finish_and_clear();
    match as_json {
        true => println!("{:#}", tally.json(&options)),
        false => println!(
            "{} pages checked, {} wrong; {} merged, {} zeros, {} from balloons; {} rounds, engine restarted {} times, \
             guests killed {} times; {} captures, {} given up, {} clones; {:.0} s",
            tally.verified,
            tally.mismatches,
            tally.merged,
            tally.zeros,
            tally.ballooned,
            tally.rounds,
            tally.engine_restarts,
            tally.guest_restarts,
            tally.captures,
            tally.given_up,
            tally.clones,
            tally.seconds
        ),
    }
    Ok(if tally.mismatches == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
