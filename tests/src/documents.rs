//! The documents, taken apart: blocks of commands, links, headings.

use std::fs;
use std::path::{Path, PathBuf};

pub struct Document {
    /// Its path below the workspace's root.
    pub path: PathBuf,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The line of its fence, counted from 1.
    pub line: usize,
    /// The words after the fence, `sh run` for one.
    pub kind: String,
    /// What is in it.
    pub text: String,
}

/// A command line of `samepage` that a document shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Where: path and line.
    pub place: String,
    /// Its words after `samepage`.
    pub words: Vec<String>,
}

/// Every Markdown file of the workspace: those at its root and below `resources`.
///
/// # Panics
/// If one cannot be read.
#[must_use]
pub fn all() -> Vec<Document> {
    let root = crate::workspace();
    let mut found = Vec::new();
    let mut directories = vec![root.join("resources")];
    for name in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        found.push(root.join(name));
    }
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory").flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => directories.push(path),
                false if path.extension().is_some_and(|e| e == "md") => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found.into_iter().map(|path| read(path.strip_prefix(root).unwrap_or(&path))).collect()
}

/// The document at this path below the workspace's root.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn read(path: &Path) -> Document {
    let text = fs::read_to_string(crate::workspace().join(path));
    Document { path: path.into(), text: text.unwrap_or_else(|e| panic!("{}: {e}", path.display())) }
}

impl Document {
    #[must_use]
    pub fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut open: Option<Block> = None;
        for (index, line) in self.text.lines().enumerate() {
            match (open.as_mut(), line.strip_prefix("```")) {
                (Some(_), Some("")) => blocks.extend(open.take()),
                (Some(block), _) => {
                    block.text.push_str(line);
                    block.text.push('\n');
                }
                (None, Some(kind)) => {
                    open = Some(Block { line: index + 1, kind: kind.trim().into(), text: String::new() });
                }
                (None, None) => {}
            }
        }
        blocks
    }

    /// Its lines outside of fenced blocks, with their numbers.
    #[must_use]
    pub fn prose(&self) -> Vec<(usize, &str)> {
        let mut fenced = false;
        let lines = self.text.lines().enumerate();
        lines
            .filter(|(_, line)| {
                let fence = line.starts_with("```");
                fenced ^= fence;
                !fenced && !fence
            })
            .map(|(index, line)| (index + 1, line))
            .collect()
    }

    /// The names by which its headings can be linked to, as GitHub makes them.
    #[must_use]
    pub fn anchors(&self) -> Vec<String> {
        let headings = self.prose().into_iter().filter(|(_, line)| line.starts_with('#'));
        headings
            .map(|(_, line)| {
                let text = line.trim_start_matches('#').trim().to_lowercase();
                let kept = text.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
                kept.map(|c| if c == ' ' { '-' } else { c }).collect()
            })
            .collect()
    }

    /// The targets of its links, with the lines in which they stand.
    #[must_use]
    pub fn links(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        // A link may be broken between its text and its target by a line's end, never within the
        // target.
        for (number, line) in self.prose() {
            for (at, _) in line.match_indices("](") {
                if let Some((target, _)) = line[at + 2..].split_once(')') {
                    found.push((number, target.to_owned()));
                }
            }
        }
        found
    }

    /// Every `samepage` command line in its shell blocks and in its indented blocks.
    #[must_use]
    pub fn command_lines(&self) -> Vec<Shown> {
        let mut found = Vec::new();
        let mut add = |number: usize, line: &str| {
            let place = format!("{}:{number}", self.path.display());
            found.extend(commands(line).into_iter().map(|words| Shown { place: place.clone(), words }));
        };
        for block in self.blocks().iter().filter(|b| b.kind.split(' ').next() == Some("sh")) {
            for (index, line) in block.text.lines().enumerate() {
                add(block.line + 1 + index, line);
            }
        }
        for (number, line) in self.prose().into_iter().filter(|(_, line)| line.starts_with("    ")) {
            add(number, line);
        }
        found
    }

    /// Every `samepage ...` in its text between backquotes: what is said in passing, with names in
    /// capitals for values.
    #[must_use]
    pub fn mentions(&self) -> Vec<Shown> {
        let mut found = Vec::new();
        for (number, line) in self.prose().into_iter().filter(|(_, line)| !line.starts_with("    ")) {
            let code = line.split('`').skip(1).step_by(2);
            for code in code.filter(|code| code.starts_with("samepage ")) {
                let place = format!("{}:{number}", self.path.display());
                let words = code.split([' ', '=']).skip(1).map(str::to_owned).collect();
                found.push(Shown { place, words });
            }
        }
        found
    }
}

/// The words after `samepage` of each call of it in a line of shell. What the shell would put in
/// for a word (`$...`) is taken for a number. Not a shell: quotes, comments, pipes, redirections
/// and `;` are all that it knows.
#[must_use]
pub fn commands(line: &str) -> Vec<Vec<String>> {
    let mut calls = vec![Vec::new()];
    for word in words(line) {
        match word {
            Word::Ends => calls.push(Vec::new()),
            Word::Text(text) => calls.last_mut().expect("one").push(text),
        }
    }
    let is_samepage = |word: &String| word == "samepage" || word.ends_with("/samepage");
    let calls = calls.into_iter().filter_map(|call| {
        let at = call.iter().position(is_samepage)?;
        // What comes before is another program that is given it, or nothing.
        Some(call[at + 1..].to_vec())
    });
    calls.collect()
}

enum Word {
    Text(String),
    /// The end of a command: what follows is another one, or a file.
    Ends,
}

fn words(line: &str) -> Vec<Word> {
    let mut found = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut depth = 0;
    for c in line.chars() {
        match c {
            _ if quote == Some(c) => quote = None,
            _ if quote.is_some() => word.get_or_insert_default().push(c),
            '\'' | '"' if depth == 0 => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            '(' => {
                depth += 1;
                word.get_or_insert_default().push(c);
            }
            ')' => depth -= 1,
            _ if depth > 0 => {}
            '#' if word.is_none() => break,
            c if c.is_whitespace() => found.extend(word.take().map(Word::Text)),
            '|' | '&' | ';' | '>' | '<' => {
                found.extend(word.take().map(Word::Text));
                found.push(Word::Ends);
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    found.extend(word.map(Word::Text));
    for word in &mut found {
        if let Word::Text(text) = word
            && text.starts_with("$(")
        {
            *text = "1".into();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document { path: "a.md".into(), text: text.into() }
    }

    #[test]
    fn blocks_links_and_anchors_are_found() {
        let a = document("# A `b`: c\n[x](y.md#z)\n```sh run\nsamepage doctor\n# no heading\n```\n");
        assert_eq!(a.anchors(), ["a-b-c"]);
        assert_eq!(a.links(), [(2, "y.md#z".to_owned())]);
        let block = Block { line: 3, kind: "sh run".into(), text: "samepage doctor\n# no heading\n".into() };
        assert_eq!(a.blocks(), [block]);
        assert_eq!(a.command_lines().len(), 1);
    }

    #[test]
    fn commands_are_told_from_the_shell_around_them() {
        assert_eq!(
            commands("samepage run --cmdline 'a b' --console none &"),
            [["run", "--cmdline", "a b", "--console", "none"]]
        );
        assert_eq!(
            commands("samepage image && cd x; tests/lab -- target/release/samepage doctor | cat"),
            [["image"], ["doctor"]]
        );
        assert_eq!(
            commands("samepage measure --pid $(pidof -s qemu) > a   # what samepage says"),
            [["measure", "--pid", "1"]]
        );
        assert!(commands("# samepage run").is_empty());
    }
}
