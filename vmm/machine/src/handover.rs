//! A VM's configuration on its way from the process that starts the VM to the VM's own: JSON in a sealed memfd.
//!
//! Sealed, so that what is read is what was written, whole, even if another process has the descriptor.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::config::VmConfig;
use os::handed;

/// The form of what is handed over. One that is not known is not guessed at.
const VERSION: u32 = 1;
/// More than any configuration has.
const MAX_BYTES: u64 = 1 << 20;
/// What makes it as good as a value.
pub(super) const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// Why a configuration could not be taken over.
#[derive(Debug, Error)]
pub enum HandoverError {
    /// There is no such descriptor, or it cannot be read.
    #[error("the configuration on descriptor {fd} cannot be read")]
    Read {
        /// Its number.
        fd: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It may still be changed.
    #[error(
        "descriptor {0} is no configuration: expected a memfd that is sealed against writing and resizing"
    )]
    Unsealed(RawFd),
    /// Far too much.
    #[error("the configuration on descriptor {0} is longer than {MAX_BYTES} bytes")]
    Length(RawFd),
    /// Another form.
    #[error(
        "the configuration on descriptor {fd} is of version {version}, and this build of samepage reads {VERSION}: start the VM with \
         the build that wrote it"
    )]
    Version {
        /// Its number.
        fd: RawFd,
        /// What it says.
        version: u32,
    },
    /// Not what it should be.
    #[error("the configuration on descriptor {fd} cannot be used")]
    Json {
        /// Its number.
        fd: RawFd,
        /// Why, and where.
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Deserialize)]
struct Form {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Handed<T> {
    version: u32,
    vm: T,
}

/// A descriptor for the VM's process to [`read`].
pub fn write(config: &VmConfig) -> io::Result<OwnedFd> {
    sealed("samepage-config", &serde_json::to_vec(&Handed { version: VERSION, vm: config })?)
}

/// A memfd of this name that has these bytes and no others, ever.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The configuration on descriptor `fd`, with which this process was started; then it is closed.
pub fn read(fd: RawFd) -> Result<VmConfig, HandoverError> {
    let taken = handed::take(fd).map_err(|source| HandoverError::Read { fd, source })?;
    parse(File::from(taken), fd)
}

/// The configuration in `file`, which another process has sent.
pub(super) fn received(file: File) -> Result<VmConfig, HandoverError> {
    let fd = file.as_raw_fd();
    parse(file, fd)
}

fn parse(file: File, fd: RawFd) -> Result<VmConfig, HandoverError> {
    // What has no seals is no memfd.
    if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALS)) {
        return Err(HandoverError::Unsealed(fd));
    }
    let (mut text, failed) = (Vec::new(), |source| HandoverError::Read { fd, source });
    // From its beginning: the writer has the same place in the file.
    io::Seek::rewind(&mut &file).map_err(failed)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(HandoverError::Length(fd));
    }
    let json = |source| HandoverError::Json { fd, source };
    // First, for another form may have other keys.
    let Form { version } = serde_json::from_slice(&text).map_err(json)?;
    if version != VERSION {
        return Err(HandoverError::Version { fd, version });
    }
    Ok(serde_json::from_slice::<Handed<VmConfig>>(&text).map_err(json)?.vm)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::working_set::Sampling;
    use crate::{Console, Drive, Overlay};
    use os::one_line;

    fn parsed(text: &str) -> Result<VmConfig, String> {
        parse(sealed("samepage-config", text.as_bytes()).unwrap().into(), 3).map_err(|e| one_line(&e))
    }

    #[test]
    fn what_is_handed_over_arrives_as_it_was() {
        let config = VmConfig {
            name: "a".into(),
            kernel: Some("/k".into()),
            cmdline: Some("quiet \"\n\u{e4}".into()),
            drives: vec![
                Drive {
                    id: "drive0".into(),
                    path: "/d".into(),
                    read_only: true,
                    is_raw: true,
                    overlay: None,
                },
                Drive { path: "/d".into(), overlay: Some(Overlay::Temporary), ..Drive::default() },
                Drive { path: "/d".into(), overlay: Some(Overlay::Kept("/e".into())), ..Drive::default() },
            ],
            console: Console::File("/log".into()),
            sampling: Some(Sampling { period: Duration::from_millis(1500), samples: 7 }),
            merge: Some(PathBuf::from("/m")),
            throttle: Some(u64::MAX),
            oom_score_adj: Some(-3),
            daemon: Some(77),
            ..VmConfig::default()
        };
        for config in [config, VmConfig::default(), VmConfig { balloon: None, ..VmConfig::default() }] {
            assert_eq!(parse(write(&config).unwrap().into(), 3).unwrap(), config);
        }
    }

    #[test]
    fn what_is_none_is_refused_by_name() {
        assert_eq!(parsed(r#"{"version": 1, "vm": {}}"#).unwrap(), VmConfig::default());
        for (text, said) in [
            (r#"{"version": 2, "vmm": {"newer": 1}}"#, "is of version 2, and this build of samepage reads 1"),
            (r#"{"version": 1, "vm": {"newer": 1}}"#, "unknown field `newer`"),
            (r#"{"version": 1, "vm": {}, "more": 1}"#, "unknown field `more`"),
            (r#"{"vm": {}}"#, "missing field `version`"),
            (r#"{"version": 1}"#, "missing field `vm`"),
            ("", "EOF"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(
                error.starts_with("the configuration on descriptor 3") && error.contains(said),
                "{error}"
            );
        }
        let long = " ".repeat(MAX_BYTES as usize + 1);
        assert!(parsed(&long).unwrap_err().contains("longer than 1048576 bytes"));
        let unsealed = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        for file in [File::from(unsealed), tempfile::tempfile().unwrap()] {
            let error = parse(file, 3).unwrap_err();
            assert!(matches!(error, HandoverError::Unsealed(3)), "{error}");
        }
        assert!(matches!(read(9999), Err(HandoverError::Read { fd: 9999, .. })));
    }
}
