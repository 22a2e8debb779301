//! An answer: a reply or an error.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Why a request was refused. On the wire it is `{"error":"TEXT","kind":"KIND"}`: `kind` is for
/// programs and stays what it is, `text` is for people and does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal<K> {
    /// The error with its causes, on one line.
    #[serde(rename = "error")]
    pub text: String,
    /// Its kind.
    #[serde(default)]
    pub kind: K,
}

impl<K> Refusal<K> {
    /// A refusal of this kind.
    pub fn new(kind: K, text: impl Into<String>) -> Self {
        Self { text: text.into(), kind }
    }
}

impl<K> fmt::Display for Refusal<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whatever has a kind can be refused with, by `?`: that is why a refusal is no `Error` itself.
impl<K, E: std::error::Error> From<E> for Refusal<K>
where
    K: for<'e> From<&'e E>,
{
    fn from(error: E) -> Self {
        Self::new(K::from(&error), os::one_line(&error))
    }
}

/// Reads an answer. An object with a key `error` is never a reply.
///
/// # Errors
/// It is neither a refusal nor such a reply.
pub fn read<R: DeserializeOwned, K: DeserializeOwned + Default>(
    line: &[u8],
) -> Result<Result<R, Refusal<K>>, serde_json::Error> {
    match serde_json::from_slice(line) {
        Ok(refusal) => Ok(Err(refusal)),
        Err(_) => serde_json::from_slice(line).map(Ok),
    }
}

/// Writes an answer, without the end of its line.
///
/// # Errors
/// The reply has no form in JSON.
pub fn write<R: Serialize, K: Serialize>(answer: &Result<R, Refusal<K>>) -> serde_json::Result<Vec<u8>> {
    match answer {
        Ok(reply) => serde_json::to_vec(reply),
        Err(refusal) => serde_json::to_vec(refusal),
    }
}

/// An enum of the kinds of errors of one protocol, each with its meaning: the documents are checked
/// against `ALL`. A peer of another build may name a kind that is not among them, which is
/// `Unknown`, or none, which is `Unsaid`.
#[macro_export]
macro_rules! error_kinds {
    ($(#[$meta:meta])* pub enum $name:ident { $(#[doc = $meaning:literal] $kind:ident,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $(#[doc = $meaning] $kind,)+
            /// The peer is of a build that names no kinds.
            #[default]
            Unsaid,
            /// A kind that only a peer of another build has.
            #[serde(other)]
            Unknown,
        }

        impl $name {
            /// Every kind that is sent, with its meaning.
            pub const ALL: &'static [(Self, &'static str)] = &[$((Self::$kind, $meaning)),+];
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    error_kinds! {
        pub enum Kind {
            /// There is none.
            NoSuchThing,
            /// Later.
            Busy,
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Reply {
        Done,
        Pages(u64),
    }

    fn answer(line: &str) -> Result<Reply, Refusal<Kind>> {
        read(line.as_bytes()).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    #[test]
    fn a_refusal_has_a_kind_and_a_text() {
        for answer in [Ok(Reply::Done), Ok(Reply::Pages(7)), Err(Refusal::new(Kind::NoSuchThing, "no: none"))]
        {
            let line = write(&answer).unwrap();
            assert_eq!(read::<Reply, Kind>(&line).unwrap(), answer);
        }
        let line = write::<Reply, _>(&Err(Refusal::new(Kind::NoSuchThing, "no"))).unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), r#"{"error":"no","kind":"no-such-thing"}"#);
    }

    #[test]
    fn peers_of_other_builds_are_understood() {
        assert_eq!(answer(r#"{"error":"no"}"#), Err(Refusal::new(Kind::Unsaid, "no")));
        let later = r#"{"kind":"no-such-kind-yet","error":"no","more":{"a":1}}"#;
        assert_eq!(answer(later), Err(Refusal::new(Kind::Unknown, "no")));
        assert_eq!(answer(later).unwrap_err().to_string(), "no");
    }

    #[test]
    fn what_is_neither_is_an_error_that_says_what_was_expected() {
        let error = read::<Reply, Kind>(br#"{"bytes":1}"#).unwrap_err().to_string();
        assert!(error.contains("`bytes`") && error.contains("`pages`"), "{error}");
        assert!(read::<Reply, Kind>(b"").is_err() && read::<Reply, Kind>(br#"{"error":1}"#).is_err());
    }

    #[test]
    fn kinds_are_listed_with_their_meaning() {
        let names: Vec<_> = Kind::ALL.iter().map(|(kind, _)| serde_json::to_string(kind).unwrap()).collect();
        assert_eq!(names, [r#""no-such-thing""#, r#""busy""#]);
        assert_eq!(Kind::ALL[1].1.trim(), "Later.");
    }
}
