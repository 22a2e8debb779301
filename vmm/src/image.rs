//! `samepage image`: makes a kernel and an initramfs for Linux guests.

mod rootfs;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::progress::{draw_target, interrupt_flag, is_set};
use anyhow::{Context, bail};
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use image::progress::Progress;
use image::{self, Destination, Flavour, Image, KernelFrom, Options};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use os::print::{PrintError, errln, outln};

/// Make a kernel and an initramfs for Linux guests, from a Debian kernel package or any kernel
#[derive(Clone, Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  samepage image                             from the newest Debian 6.12 cloud kernel that apt knows
  samepage image --release 6.1               from the newest 6.1
  samepage image --deb linux-image.deb       from a kernel package
  samepage image --kernel /boot/vmlinuz-$(uname -r) --modules /lib/modules/$(uname -r)
  samepage image --module btrfs --out ./image
  samepage image rootfs root.img             a root file system of Debian, for `--drive root.img --cmdline 'root=/dev/vda rw ...'`

The image is a directory with vmlinux, vmlinuz (the same, packed), initrd.cpio and image.json. Without --out it goes to
$XDG_CACHE_HOME/samepage/images (or ~/.cache/samepage/images), where `latest` leads to the newest.")]
pub(super) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// Directory to make the image in; an existing image is replaced
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Take the kernel and its modules out of this Debian package
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "flavour", "release"])]
    deb: Option<PathBuf>,
    /// Take this kernel: a vmlinux, bzImage or vmlinuz
    #[arg(long, value_name = "FILE", conflicts_with_all = ["flavour", "release"])]
    kernel: Option<PathBuf>,
    /// The modules of --kernel; without it, all that are needed must be built in
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Which Debian kernel
    #[arg(long, value_enum, default_value_t = FlavourName::Cloud)]
    flavour: FlavourName,
    /// Which kernel release
    #[arg(long, value_name = "NUMBER", default_value = "6.12")]
    release: String,
    /// Add this kernel module and what it depends on; may be repeated
    #[arg(long = "module", value_name = "NAME")]
    module: Vec<String>,
    /// Print what was made as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Subcommand)]
enum What {
    Rootfs(rootfs::Args),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FlavourName {
    /// For virtual machines: fewer drivers, starts faster
    Cloud,
    /// For any machine
    Generic,
}

/// Makes the image with `agent` as its /init, and prints the command to start a guest from it.
pub(super) fn run(args: Args, agent: &[u8]) -> anyhow::Result<()> {
    if let Some(What::Rootfs(args)) = args.what {
        return rootfs::run(args);
    }
    let source = match (args.deb, args.kernel) {
        (Some(deb), _) => KernelFrom::Package(deb),
        (_, Some(kernel)) => KernelFrom::Files { kernel, modules: args.modules },
        _ => KernelFrom::Newest {
            release: args.release,
            flavour: match args.flavour {
                FlavourName::Cloud => Flavour::Cloud,
                FlavourName::Generic => Flavour::Generic,
            },
        },
    };
    let without_modules = matches!(source, KernelFrom::Files { modules: None, .. });
    if without_modules && !args.module.is_empty() {
        bail!("--module needs --modules DIR to take {} from", args.module.join(", "));
    }
    let to = match args.out {
        Some(dir) => Destination::Dir(dir),
        None => Destination::Collection(default_collection()?),
    };
    // Ctrl-C, a closed terminal and `kill` end the work in order, so that nothing half done is
    // left.
    let mut bar = Bar::new(interrupt_flag()?);
    let image = image::make(&Options { source, modules: args.module, to }, agent, &mut bar);
    bar.0.finish_and_clear();
    let image = image?;
    if args.json {
        outln!("{}", serde_json::to_string_pretty(&image)?)?;
    } else {
        print(&image)?;
        if without_modules {
            errln!("note: no modules; the kernel must have {} built in", image::MODULES.join(", "));
        }
    }
    Ok(())
}

fn print(image: &Image) -> Result<(), PrintError> {
    match &image.package {
        Some(package) => outln!("Linux {} from {} {}", image.name, package.name, package.version)?,
        None => outln!("Linux {}", image.name)?,
    }
    outln!("  kernel  {}  {}", image.kernel.display(), HumanBytes(image.kernel_bytes))?;
    outln!("  initrd  {}  {}", image.initrd.display(), HumanBytes(image.initrd_bytes))?;
    for (what, names) in [("modules", &image.modules), ("built in", &image.builtin)] {
        if !names.is_empty() {
            outln!("  {what}: {}", names.join(", "))?;
        }
    }
    outln!("\nStart a guest from it:")?;
    outln!("  samepage run --kernel {} --initrd {}", quoted(&image.kernel), quoted(&image.initrd))
}

/// A path as a shell takes it.
fn quoted(path: &std::path::Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._+-~=:@%,".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Where images go, and where `latest` is found.
pub(super) fn default_collection() -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    let cache = cache.context("neither XDG_CACHE_HOME nor HOME is set; say where with --out DIR")?;
    Ok(cache.join("samepage/images"))
}

/// A progress bar where stderr is a terminal, and nothing elsewhere.
struct Bar(ProgressBar, Arc<AtomicBool>);

impl Bar {
    fn new(interrupted: Arc<AtomicBool>) -> Self {
        Self(ProgressBar::with_draw_target(None, draw_target()), interrupted)
    }
}

impl Progress for Bar {
    fn stage(&mut self, what: &str, total_bytes: Option<u64>) {
        let template = match total_bytes {
            Some(_) => "{msg} {bar:30} {bytes}/{total_bytes}",
            None => "{spinner} {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        self.0.reset();
        match total_bytes {
            Some(total) => self.0.set_length(total),
            None => self.0.unset_length(),
        }
        self.0.set_message(what.to_string());
        self.0.tick();
    }

    fn at(&mut self, bytes: u64) {
        self.0.set_position(bytes);
    }

    fn stopped(&self) -> bool {
        is_set(&self.1)
    }
}
