//! Checkpoints on their way: `samepage snapshot export` and `import`, `samepage send` and `receive`.

use std::fs::{self, OpenOptions};
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::checkpoint::{STORE_LIMIT, Where, bar};
use super::choice;
use super::progress::{interrupt_flag, is_set};
use fleet::checkpoints::Description;
use os::named_file;
use os::print::{errln, outln};
use store::{Compression, Incoming, Name, Outgoing, Saved};

/// What a sender that waits for answers begins with; behind it are the bytes of the label, and the label.
const HELLO: &[u8; 8] = b"SPSEND01";
/// What one begins with that waits for none, and the same is behind it.
const NAMED: &[u8; 8] = b"SPNAME01";
/// What the receiver ends with.
const DONE: &[u8; 8] = b"SPDONE01";
/// More than any label has.
const MAX_LABEL_BYTES: u32 = 4096;

/// Which checkpoint comes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Label {
    name: String,
    domain: String,
}

impl Label {
    fn write(&self, hello: &[u8; 8], to: &mut impl Write) -> anyhow::Result<()> {
        let label = serde_json::to_vec(self)?;
        to.write_all(hello)?;
        to.write_all(&u32::try_from(label.len())?.to_le_bytes())?;
        Ok(to.write_all(&label)?)
    }

    /// Behind one of the beginnings.
    fn read(from: &mut impl Read) -> anyhow::Result<Self> {
        let mut bytes = [0; 4];
        from.read_exact(&mut bytes)?;
        let bytes = u32::from_le_bytes(bytes);
        if bytes > MAX_LABEL_BYTES {
            bail!("what comes says that its label has {bytes} bytes: expected at most {MAX_LABEL_BYTES}");
        }
        let mut label = vec![0; bytes as usize];
        from.read_exact(&mut label)?;
        serde_json::from_slice(&label).context("what comes has no label")
    }
}

/// Writes a checkpoint to a file, with all that it needs.
pub(super) fn export(
    place: &Where,
    snapshot: &str,
    file: &Path,
    compress: Compression,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let made =
        made.with_context(|| format!("cannot make {}, which must not be there yet", file.display()))?;
    let mut to = BufWriter::new(&made);
    let written = write(place, snapshot, &mut to, compress).and_then(|pages| {
        drop(to);
        made.sync_all().with_context(|| format!("cannot write {}", file.display()))?;
        Ok(pages)
    });
    // What is there in part is of no use.
    let pages = written.inspect_err(|_| _ = fs::remove_file(file))?;
    let bytes = made.metadata()?.len();
    match json {
        true => outln!("{}", serde_json::json!({ "name": snapshot, "pages": pages, "bytes": bytes }))?,
        false => outln!(
            "{}: {snapshot}, {pages} pages, {:.1} MiB",
            file.display(),
            bytes as f64 / f64::from(1 << 20)
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes all of a checkpoint. How many pages there were.
fn write(place: &Where, snapshot: &str, to: &mut dyn Write, compress: Compression) -> anyhow::Result<u64> {
    let name = Name::new(snapshot)?;
    let domain = place.domain_of(&name)?;
    let store = place.shelf()?.store(&domain)?.context("its store is gone")?;
    let (reading, bar, interrupted) = (store.read(STORE_LIMIT)?, bar("write"), interrupt_flag()?);
    let outgoing = Outgoing::of(&reading, &name)?;
    let pages = outgoing.export(to, compress, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !is_set(&interrupted)
    })?;
    bar.finish_and_clear();
    Ok(pages)
}

/// What came of it, and where.
#[derive(Serialize)]
struct Imported {
    name: String,
    domain: String,
    #[serde(flatten)]
    saved: Saved,
}

/// Takes a checkpoint from a file.
pub(super) fn import(
    place: &Where,
    file: &Path,
    called: Option<&str>,
    compress: Compression,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let opened = named_file::regular(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut from = BufReader::new(opened.0);
    // The file's name, but for its end.
    let stem = || file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
    let name = called.map_or_else(stem, str::to_owned);
    show(&take(place, &name, &mut from, compress)?, json)
}

fn take(place: &Where, name: &str, from: &mut dyn Read, compress: Compression) -> anyhow::Result<Imported> {
    let name = Name::new(name)?;
    let incoming = Incoming::read(from)?;
    let (domain, meta) = Description::imported(name.as_str(), incoming.meta(), place.said_domain())?;
    let store = place.shelf()?.open(&domain)?;
    let (bar, interrupted) = (bar("read"), interrupt_flag()?);
    let writing = store.write(STORE_LIMIT)?;
    let saved = incoming.import(&writing, &name, (meta, compress), from, &mut |done, total| {
        bar.set_length(total.max(1));
        bar.set_position(done);
        !is_set(&interrupted)
    })?;
    bar.finish_and_clear();
    Ok(Imported { name: name.as_str().into(), domain, saved })
}

fn show(imported: &Imported, json: bool) -> anyhow::Result<ExitCode> {
    let Imported { name, domain, saved } = imported;
    match json {
        true => outln!("{}", serde_json::to_string(imported)?)?,
        false => outln!(
            "{name}: in the store of domain {domain}; {} pages, {} of them new",
            saved.pages,
            saved.new_pages
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Send a checkpoint to another host: the pages that are not there yet
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage send warm -- ssh HOST samepage receive       asks which pages are there, and sends the others
  samepage send warm | ssh HOST samepage receive        asks nothing, and sends all of them

On the other side it has the same name, in the store of the same domain, unless `receive` says otherwise.")]
pub(super) struct SendArgs {
    /// The checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// How pages are compressed on the way
    #[arg(long, value_name = "HOW", default_value = "lz4", value_parser = choice::compression())]
    compress: Compression,
    #[command(flatten)]
    place: Where,
    /// A command whose standard input and output are those of `samepage receive`
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Take a checkpoint that `samepage send` sends, from standard input
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage receive < FILE
  samepage send warm -- ssh HOST samepage receive --store /srv/checkpoints")]
pub(super) struct ReceiveArgs {
    /// What it is to be called [default: as at its sender; `received` if that does not say, as a file does not]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// How its pages are compressed on the disk
    #[arg(long, value_name = "HOW", default_value = "lz4", value_parser = choice::compression())]
    compress: Compression,
    #[command(flatten)]
    place: Where,
}

pub(super) fn run_send(args: SendArgs) -> anyhow::Result<ExitCode> {
    let SendArgs { checkpoint, compress, place, command } = args;
    let Some((program, arguments)) = command.split_first() else {
        let out = io::stdout();
        if out.is_terminal() {
            bail!("standard output is a terminal: send it to a file, a pipe, or `-- COMMAND`");
        }
        let mut to = BufWriter::new(out.lock());
        let domain = place.domain_of(&Name::new(&checkpoint)?)?;
        Label { name: checkpoint.clone(), domain }.write(NAMED, &mut to)?;
        let pages = write(&place, &checkpoint, &mut to, compress)?;
        to.flush().context("cannot write to standard output")?;
        errln!("{checkpoint}: {pages} pages sent");
        return Ok(ExitCode::SUCCESS);
    };
    let name = Name::new(&checkpoint)?;
    let domain = place.domain_of(&name)?;
    let store = place.shelf()?.store(&domain)?.context("its store is gone")?;
    let reading = store.read(STORE_LIMIT)?;
    let outgoing = Outgoing::of(&reading, &name)?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let (to, from) =
        (child.stdin.take().context("it has no input")?, child.stdout.take().context("it has no output")?);
    let sent = converse(&outgoing, &Label { name: checkpoint.clone(), domain }, to, from, compress);
    // What it says of it on standard error stands there already.
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    let pages = match (sent, status.success()) {
        (Ok(pages), true) => pages,
        (_, false) => bail!("{program} did not take it: {status}"),
        (Err(error), true) => return Err(error),
    };
    errln!("{checkpoint}: {pages} of {} pages sent, the others were there", outgoing.pages());
    Ok(ExitCode::SUCCESS)
}

/// How many pages were sent.
fn converse(
    outgoing: &Outgoing<'_>,
    label: &Label,
    to: impl Write,
    mut from: impl Read,
    compress: Compression,
) -> anyhow::Result<u64> {
    let (mut to, bar, interrupted) = (BufWriter::new(to), bar("send"), interrupt_flag()?);
    label.write(HELLO, &mut to)?;
    to.flush()?;
    let pages = outgoing.send(&mut to, &mut from, compress, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        !is_set(&interrupted)
    })?;
    to.flush()?;
    let mut done = [0; 8];
    from.read_exact(&mut done).context("the other side did not say that it has it")?;
    bar.finish_and_clear();
    if done != *DONE { bail!("the other side did not say that it has it") } else { Ok(pages) }
}

pub(super) fn run_receive(args: ReceiveArgs) -> anyhow::Result<ExitCode> {
    let ReceiveArgs { name, compress, place } = args;
    let mut from = BufReader::new(io::stdin().lock());
    let mut begin = [0; 8];
    from.read_exact(&mut begin).context("nothing came on standard input")?;
    if begin == *NAMED {
        let label = Label::read(&mut from)?;
        let name = name.unwrap_or(label.name);
        return show(&take(&place, &name, &mut from, compress)?, false);
    }
    if begin != *HELLO {
        // A file.
        let name = name.unwrap_or_else(|| "received".into());
        return show(&take(&place, &name, &mut begin.chain(&mut from), compress)?, false);
    }
    let label = Label::read(&mut from)?;
    let name = Name::new(&name.unwrap_or(label.name))?;
    let domain = place.said_domain().map_or(label.domain, str::to_owned);
    let store = place.shelf()?.open(&domain)?;
    let mut to = io::stdout().lock();
    let incoming = Incoming::receive(&store, &mut from, &mut to)?;
    let (_, meta) = Description::imported(name.as_str(), incoming.meta(), Some(&domain))?;
    let writing = store.write(STORE_LIMIT)?;
    incoming.import_missing(&writing, &name, (meta, compress), (&mut from, &mut to), &mut |_, _| true)?;
    to.write_all(DONE).and_then(|()| to.flush()).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}
