//! `samepage image`: makes a kernel and an initramfs for Linux guests.

mod rootfs;
mod shown;

use std::path::PathBuf;

use self::shown::{Bar, quoted};
use super::progress::interrupt_flag;
use anyhow::{Context, bail};
use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use image::{self, Destination, Flavour, Image, KernelFrom, Options};
use indicatif::HumanBytes;
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

/// Where images go, and where `latest` is found.
pub(super) fn default_collection() -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    let cache = cache.context("neither XDG_CACHE_HOME nor HOME is set; say where with --out DIR")?;
    Ok(cache.join("samepage/images"))
}
