//! Which VMs may join a fleet that did not start them: `[open]` in a fleet file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::SpecError;
use super::names::check_name;
use super::paths::resolve;

/// A fleet that is open to VMs which others start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a table such as { socket = \"/run/vms.sock\", domains = [{ uid = 1000, domain = \"a\" }] }"
)]
pub struct Open {
    /// Where they find it; None: in the fleet's directory, which only this user reaches.
    pub socket: Option<PathBuf>,
    /// Which VM belongs to which domain: the first that fits. None at all: this user's VMs belong
    /// to the domain that is called as the fleet.
    pub domains: Vec<DomainRule>,
}

/// Which VMs belong to a domain. What is said must all be so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { uid = 1000, domain = \"a\" }")]
pub struct DomainRule {
    /// Their user.
    pub uid: Option<u32>,
    /// Their control group (version 2), or one above it.
    pub cgroup: Option<String>,
    /// The domain.
    pub domain: String,
}

impl DomainRule {
    fn fits(&self, uid: u32, cgroup: &str) -> bool {
        let is_below = |above: &String| {
            let rest = cgroup.strip_prefix(above.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.uid.is_none_or(|wanted| wanted == uid) && self.cgroup.as_ref().is_none_or(is_below)
    }
}

impl Open {
    /// The domain of a VM of this user in this control group, in `fleet`.
    pub fn domain<'a>(&'a self, fleet: &'a str, uid: u32, cgroup: &str) -> Option<&'a str> {
        match self.domains.is_empty() {
            true => (uid == rustix::process::getuid().as_raw()).then_some(fleet),
            false => Some(&self.domains.iter().find(|rule| rule.fits(uid, cgroup))?.domain),
        }
    }

    /// As a file in `dir` gives it, checked.
    pub(super) fn checked(mut self, dir: &Path) -> Result<Self, SpecError> {
        for rule in &self.domains {
            check_name(&rule.domain)?;
            match (&rule.uid, &rule.cgroup) {
                (None, None) => return Err(SpecError::OpenRule { domain: rule.domain.clone() }),
                (_, Some(cgroup)) if !cgroup.starts_with('/') => {
                    return Err(SpecError::Cgroup { cgroup: cgroup.clone() });
                }
                _ => {}
            }
        }
        self.socket = self.socket.map(|path| resolve(&path, dir));
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_fits_says_the_domain() {
        let own = rustix::process::getuid().as_raw();
        let open = Open::default();
        assert_eq!(open.domain("f", own, "/"), Some("f"));
        assert_eq!(open.domain("f", own + 1, "/"), None);
        let text = "domains = [{ uid = 7, cgroup = '/a/b', domain = 'both' }, { cgroup = '/a', domain = 'group' }, { uid = 8, domain = 'user' }]";
        let open: Open = toml::from_str(text).unwrap();
        for (uid, cgroup, domain) in [
            (7, "/a/b", Some("both")),
            (7, "/a/b/c", Some("both")),
            (7, "/a/bc", Some("group")),
            (9, "/a", Some("group")),
            (9, "/ab", None),
            (8, "/", Some("user")),
            (own, "/", None),
        ] {
            assert_eq!(open.domain("f", uid, cgroup), domain, "{uid} {cgroup}");
        }
        let root: Open = toml::from_str("domains = [{ cgroup = '/', domain = 'all' }]").unwrap();
        assert_eq!(root.domain("f", 1, "/x"), Some("all"));
    }
}
