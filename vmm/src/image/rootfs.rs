//! `samepage image rootfs`: makes the root file system of a Linux guest.

use std::path::PathBuf;

use image::rootfs::{self, MAX_BYTES, Options, Source};
use indicatif::HumanBytes;
use memory::size::parse_size;
use os::print::outln;

use super::shown::{Bar, quoted};
use crate::progress::interrupt_flag;

/// Make the root file system of a Linux guest: an ext4 image of Debian, of a tar archive, or of a
/// directory
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  samepage image rootfs root.img                                   Debian's essential packages, with a small init
  samepage image rootfs root.img --include iproute2,nginx-light    and these
  samepage image rootfs root.img --include systemd-sysv,udev,iproute2   with systemd
  samepage image rootfs root.img --dir ./tree --size 2G
  samepage image rootfs root.img --tar tree.tar

No root is needed: `mmdebstrap` makes Debian's tree, `mke2fs` and `debugfs` (e2fsprogs) the image. Root has no password, so whatever has the
console of the guest is root. A tree without an init gets one that mounts /proc, /sys and /run, starts a shell on the console, and
ends by poweroff and reboot. Interfaces are configured by `ip=` on the kernel's command line.")]
pub(crate) struct Args {
    /// The image; one that is there is replaced when the new one is whole
    #[arg(value_name = "FILE")]
    to: PathBuf,
    /// Which Debian
    #[arg(long, value_name = "SUITE", default_value = "bookworm", conflicts_with_all = ["dir", "tar"])]
    debian: String,
    /// Packages beside the essential ones, with commas in between
    #[arg(long, value_name = "PACKAGES", value_delimiter = ',', conflicts_with_all = ["dir", "tar"])]
    include: Vec<String>,
    /// Where packages come from: a URL, a line of sources.list, or such a file; may be repeated
    /// [default: Debian's own]
    #[arg(long, value_name = "MIRROR", conflicts_with_all = ["dir", "tar"])]
    mirror: Vec<String>,
    /// The tree in this directory, instead of Debian
    #[arg(long, value_name = "DIR", conflicts_with = "tar")]
    dir: Option<PathBuf>,
    /// The tree in this archive, which is not compressed
    #[arg(long, value_name = "FILE")]
    tar: Option<PathBuf>,
    /// The size of the image, which is sparse: 16M to 256G [default: that of the tree, a quarter,
    /// and 1 GiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Print what was made as one JSON object
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text, 16 << 20, MAX_BYTES).map_err(|error| error.to_string())
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let source = match (args.dir, args.tar) {
        (Some(dir), _) => Source::Dir(dir),
        (_, Some(tar)) => Source::Tar(tar),
        _ => Source::Debian { suite: args.debian, packages: args.include, mirrors: args.mirror },
    };
    let mut bar = Bar::new(interrupt_flag()?);
    let made = rootfs::make(&Options { source, bytes: args.size, to: args.to }, &mut bar);
    bar.0.finish_and_clear();
    let made = made?;
    if args.json {
        return Ok(outln!("{}", serde_json::to_string_pretty(&made)?)?);
    }
    let (bytes, allocated) = (HumanBytes(made.bytes), HumanBytes(made.allocated_bytes));
    outln!("{}  {bytes}, {allocated} of them on disk, {} files", made.path.display(), made.files)?;
    if made.has_small_init {
        outln!("  the tree has no init: it got one with a shell on the console")?;
    }
    outln!("\nStart a guest from it, whose writes end with it:")?;
    outln!(
        "  samepage run --memory 256M --kernel ~/.cache/samepage/images/latest/vmlinux \\\n    --initrd \
         ~/.cache/samepage/images/latest/initrd.cpio --drive {},overlay \\\n    --cmdline 'console=ttyS0 quiet panic=-1 root=/dev/vda rw'",
        quoted(&made.path)
    )?;
    Ok(())
}
