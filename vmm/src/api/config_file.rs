//! A file that says what the API would be told: one JSON object, with a section for each endpoint.

use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};
use thiserror::Error;

use super::fault::Fault;
use super::request::{NOT_YET, Request};
use crate::process::named_file;

/// The sections, in the order in which they are carried out.
const SECTIONS: &[&str] = &["machine-config", "boot-source", "drives", "balloon", "metrics"];
/// The longest file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a VM cannot be configured from a file.
#[derive(Debug, Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is far longer than any description of a VM.
    #[error("it is longer than {MAX_FILE_BYTES} bytes")]
    Length,
    /// It is something else.
    #[error("it is not a JSON object")]
    Json(#[source] serde_json::Error),
    /// It has a section nobody knows.
    #[error("there is no section {section:?}: did you mean {nearest:?}?")]
    Unknown {
        /// The section.
        section: String,
        /// One that there is.
        nearest: &'static str,
    },
    /// A section cannot be carried out.
    #[error("the section {section:?} cannot be used")]
    Section {
        /// The section.
        section: String,
        /// Why.
        #[source]
        source: Box<Fault>,
    },
}

impl ConfigFileError {
    /// Says which section it was.
    pub(super) fn section(section: &str) -> impl FnOnce(Fault) -> Self {
        move |source| Self::Section { section: section.into(), source: Box::new(source) }
    }
}

/// The requests that a file stands for, with their sections, without the one that starts the VM.
pub fn read(path: &Path) -> Result<Vec<(&'static str, Request)>, ConfigFileError> {
    let mut text = Vec::new();
    let file = named_file::stream(path).map_err(ConfigFileError::Read)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(ConfigFileError::Read)?;
    match text.len() as u64 > MAX_FILE_BYTES {
        true => Err(ConfigFileError::Length),
        false => requests(&text),
    }
}

fn requests(text: &[u8]) -> Result<Vec<(&'static str, Request)>, ConfigFileError> {
    let mut sections: Map<String, Value> = serde_json::from_slice(text).map_err(ConfigFileError::Json)?;
    // What GET /vm/config shows of what is not there, and what Firecracker's own files have for none.
    sections.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|all| !all.is_empty()));
    if let Some(section) = sections.keys().find(|s| !SECTIONS.contains(&s.as_str())) {
        if NOT_YET.contains(&section.as_str()) {
            let fault = Fault::NotYet { method: "PUT".into(), path: format!("/{section}") };
            return Err(ConfigFileError::section(section)(fault));
        }
        let likeness = |known: &&&str| (strsim::jaro_winkler(known, section) * 1000.0) as u32;
        let nearest = SECTIONS.iter().max_by_key(likeness).copied().unwrap_or_default();
        return Err(ConfigFileError::Unknown { section: section.clone(), nearest });
    }
    let known = SECTIONS.iter().filter_map(|name| Some((*name, sections.remove(*name)?)));
    // Of drives there are several, each at a path of its own.
    let objects = known.flat_map(|(section, value)| match value {
        Value::Array(all) if section == "drives" => all.into_iter().map(|one| (section, one)).collect(),
        value => vec![(section, value)],
    });
    objects
        .map(|(section, value)| {
            let path = match value.get("drive_id").and_then(Value::as_str) {
                Some(id) if section == "drives" => format!("/{section}/{id}"),
                // What its key is missing from is said all the same.
                _ if section == "drives" => format!("/{section}/?"),
                _ => format!("/{section}"),
            };
            let request = Request::parse("PUT", &path, value.to_string().as_bytes());
            Ok((section, request.map_err(ConfigFileError::section(section))?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::chain;

    fn read(text: &str) -> Result<Vec<&'static str>, String> {
        let requests = requests(text.as_bytes());
        requests.map(|all| all.into_iter().map(|(s, _)| s).collect()).map_err(|e| chain(&e))
    }

    #[test]
    fn sections_become_requests_in_a_working_order() {
        let text = r#"{"balloon":{"amount_mib":0,"deflate_on_oom":true},"boot-source":{"kernel_image_path":"a"},
            "machine-config":{"vcpu_count":1,"mem_size_mib":64},"metrics":null,"drives":[],"vsock":null}"#;
        assert_eq!(read(text).unwrap(), ["machine-config", "boot-source", "balloon"]);
        let drives = r#"{"drives":[{"drive_id":"a","path_on_host":"p","is_root_device":false},
            {"drive_id":"b","path_on_host":"q","is_root_device":true}],"boot-source":{"kernel_image_path":"a"}}"#;
        assert_eq!(read(drives).unwrap(), ["boot-source", "drives", "drives"]);
        assert_eq!(read("{}").unwrap(), Vec::<&str>::new());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, said) in [
            (r#"{"machine-cfg":{}}"#, "did you mean \"machine-config\"?"),
            (r#"{"boot_source":{}}"#, "did you mean \"boot-source\"?"),
            (r#"{"baloon":{}}"#, "did you mean \"balloon\"?"),
            (r#"{"vsock":{"a":1}}"#, "not supported by Samepage yet"),
            (r#"{"drives":[{}]}"#, "\"drives\" cannot be used: An error"),
            (r#"{"drives":[{"drive_id":"a","path_on_host":"p"}]}"#, "missing field `is_root_device`"),
            (r#"{"drives":[{"drive_id":"a/b","path_on_host":"p","is_root_device":true}]}"#, "a/b"),
            (r#"{"balloon":{}}"#, "\"balloon\" cannot be used: An error"),
            ("[]", "it is not a JSON object"),
            ("", "EOF"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
