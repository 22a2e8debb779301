//! The files that the rules read, with comments, literals and tests told apart from code.

use std::fs;
use std::io;
use std::path::Path;

/// What no rule reads: built, downloaded, or not ours.
const SKIPPED: &[&str] = &["target", ".git"];
/// The kinds of files that rules read.
const KINDS: &[&str] = &["rs", "toml", "md"];

pub struct Source {
    /// Path below the workspace's root, with `/`.
    pub path: String,
    pub text: String,
    /// Whether all of it is compiled for tests only.
    pub test_only: bool,
}

/// One line of Rust without comments and with the contents of string and character literals taken
/// out.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// Counted from 1.
    pub number: usize,
    /// What the compiler sees, but for literals.
    pub code: String,
    /// Whether it is compiled for tests only.
    pub in_test: bool,
}

impl Source {
    /// A file by itself: its path tells whether it holds tests.
    #[must_use]
    pub fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        let path = path.into();
        let test_only = ["tests.rs", "_tests.rs"].iter().any(|end| path.ends_with(end))
            || path.starts_with("tests/")
            || path.contains("/tests/");
        Self { path, text: text.into(), test_only }
    }

    /// Every Rust, TOML and Markdown file below `root`.
    ///
    /// # Errors
    /// A directory or a file that cannot be read.
    pub fn all(root: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        let mut directories = vec![root.to_path_buf()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                let path = entry.path();
                let name = entry.file_name();
                if entry.file_type()?.is_dir() {
                    if !SKIPPED.iter().any(|s| name == *s) {
                        directories.push(path);
                    }
                } else if path.extension().is_some_and(|e| KINDS.iter().any(|k| e == *k)) {
                    let below = path.strip_prefix(root).unwrap_or(&path);
                    let below = below.to_string_lossy().into_owned();
                    found.push(Self::new(below, fs::read_to_string(&path)?));
                }
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        mark_test_modules(&mut found);
        Ok(found)
    }

    /// Whether this is a Rust file below `directory`.
    #[must_use]
    pub fn is_rust_below(&self, directory: &str) -> bool {
        self.path.ends_with(".rs") && self.path.starts_with(directory)
    }

    /// Its lines as the compiler sees them.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        let mut test = TestBlock::default();
        code_of(&self.text)
            .lines()
            .enumerate()
            .map(|(index, code)| Line {
                number: index + 1,
                in_test: test.holds(code) || self.test_only,
                code: code.to_owned(),
            })
            .collect()
    }
}

/// Marks the files of modules that are declared under `#[cfg(test)]`.
fn mark_test_modules(sources: &mut [Source]) {
    let mut modules = Vec::new();
    for source in sources.iter().filter(|s| s.path.ends_with(".rs")) {
        let stem = source.path.trim_end_matches(".rs");
        let is_root = ["mod", "lib", "main"].iter().any(|root| stem.ends_with(&format!("/{root}")));
        let directory =
            if is_root { stem.rsplit_once('/').map_or("", |(directory, _)| directory) } else { stem };
        for line in source.lines().iter().filter(|line| line.in_test && line.code.trim_end().ends_with(';')) {
            if let Some((_, name)) = line.code.trim_end_matches([';', ' ']).split_once("mod ") {
                modules.push(format!("{directory}/{name}"));
            }
        }
    }
    for source in sources {
        source.test_only |= modules
            .iter()
            .any(|m| source.path == format!("{m}.rs") || source.path.starts_with(&format!("{m}/")));
    }
}

/// Follows braces to know where an item under `#[cfg(test)]` ends.
#[derive(Default)]
struct TestBlock {
    announced: bool,
    depth: usize,
}

impl TestBlock {
    fn holds(&mut self, code: &str) -> bool {
        if self.depth == 0 && code.contains("#[cfg(test)]") {
            self.announced = true;
        }
        let inside = self.announced || self.depth > 0;
        if inside {
            for c in code.chars() {
                match c {
                    '{' => {
                        self.announced = false;
                        self.depth += 1;
                    }
                    '}' => self.depth = self.depth.saturating_sub(1),
                    ';' if self.announced && self.depth == 0 => self.announced = false,
                    _ => {}
                }
            }
        }
        inside
    }
}

/// The text with comments, and the contents of literals, taken out; line breaks stay.
fn code_of(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (skipped, stands_for) = literal_or_comment(rest, out.chars().next_back());
        if skipped > 0 {
            out.push_str(stands_for);
            out.extend(rest[..skipped].chars().filter(|c| *c == '\n'));
            rest = &rest[skipped..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// The length of the comment or literal that `rest` begins with, and what is left of it.
fn literal_or_comment(rest: &str, before: Option<char>) -> (usize, &'static str) {
    let after_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), "");
    }
    if rest.starts_with("/*") {
        return (rest.find("*/").map_or(rest.len(), |end| end + 2), "");
    }
    if let Some(inside) = rest.strip_prefix('"') {
        return (1 + quoted(inside, '"'), "\"\"");
    }
    if !after_word && let Some(raw) = rest.strip_prefix('r').or_else(|| rest.strip_prefix("br")) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let start = rest.len() - raw.len() + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            return (rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len()), "\"\"");
        }
    }
    // A character, and not a lifetime.
    if let Some(inside) = rest.strip_prefix('\'') {
        let mut chars = inside.chars();
        let (first, second) = (chars.next(), chars.next());
        if first == Some('\\') || (first.is_some() && second == Some('\'')) {
            return (1 + quoted(inside, '\''), "' '");
        }
    }
    (0, "")
}

/// The length of what follows an opening quote, with the closing one.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<(usize, String, bool)> {
        let source = Source::new("vmm/src/a.rs", text);
        source.lines().into_iter().map(|l| (l.number, l.code, l.in_test)).collect()
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        let text =
            "a(\"panic! \\\" x\"); // todo!\nb('\"', '\\'', 'x'); /* c\n d */ e::<'life>(r#\"f\"g\"#) h\n";
        let code: Vec<String> = lines(text).into_iter().map(|(_, code, _)| code).collect();
        assert_eq!(code, ["a(\"\"); ", "b(' ', ' ', ' '); ", " e::<'life>(\"\") h"]);
    }

    #[test]
    fn what_is_compiled_for_tests_is_marked() {
        let text = "a();\n#[cfg(test)]\nmod tests {\n  fn b() { c() }\n}\nd();\n#[cfg(test)]\nmod x;\ne();\n";
        let in_test: Vec<bool> = lines(text).into_iter().map(|(_, _, in_test)| in_test).collect();
        assert_eq!(in_test, [false, true, true, true, true, false, true, true, false]);
    }

    #[test]
    fn modules_for_tests_are_marked() {
        let mut sources = [
            Source::new("a/src/b/mod.rs", "mod c;\n#[cfg(test)]\npub(crate) mod fake;\n"),
            Source::new("a/src/b/c.rs", ""),
            Source::new("a/src/b/fake.rs", ""),
            Source::new("a/src/b/fake/d.rs", ""),
        ];
        mark_test_modules(&mut sources);
        assert_eq!(sources.map(|s| s.test_only), [false, false, true, true]);
    }
}
