//! No circle of files within a crate: of two files that need each other, neither can be read, or
//! changed, alone.
//!
//! An arrow goes from a file to the one that defines what it names, in a `use` or in a path. `mod`
//! and `pub use` make none: a name that is passed on is followed to where it is defined. What
//! stands behind a macro of another crate, a glob or a method call is not seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Finding, Source};

/// Crates with files that need each other still, most of them a whole and its parts.
const NOT_YET: &[&str] = &["guest", "tests", "vmm/jail"];

/// A module's path below its crate, and so a file's.
type Module = Vec<String>;

#[derive(Default)]
struct File {
    path: String,
    /// What `use` binds, and to what.
    binds: BTreeMap<String, Vec<String>>,
    /// Paths that it names.
    names: Vec<Vec<String>>,
}

type Crate = BTreeMap<Module, File>;

pub(super) fn no_circles(sources: &[Source]) -> Vec<Finding> {
    let mut crates: BTreeMap<&str, Crate> = BTreeMap::new();
    for source in sources.iter().filter(|s| s.is_rust_below("") && !s.test_only) {
        let Some((root, below)) = source.path.split_once("/src/") else { continue };
        if below.starts_with("bin/") || NOT_YET.contains(&root) {
            continue;
        }
        let mut module: Module = below.trim_end_matches(".rs").split('/').map(Into::into).collect();
        if module.last().is_some_and(|last| ["lib", "main", "mod"].contains(&last.as_str())) {
            module.pop();
        }
        crates.entry(root).or_default().insert(module, read(source));
    }
    crates.values().flat_map(circles).collect()
}

/// The circles of a crate, each told once, by a shortest way around.
fn circles(files: &Crate) -> Vec<Finding> {
    let arrows: BTreeMap<&Module, BTreeSet<&Module>> = files
        .iter()
        .map(|(module, file)| {
            let named = file.names.iter().filter_map(|name| resolve(files, module, name, 0));
            (module, named.filter(|other| *other != module).collect())
        })
        .collect();
    let (mut found, mut told) = (Vec::new(), BTreeSet::new());
    for module in files.keys() {
        let Some(around) = way_back(&arrows, module).filter(|way| way.iter().all(|m| !told.contains(m)))
        else {
            continue;
        };
        told.extend(around.iter().copied());
        let name = |m: &&Module| if m.is_empty() { "lib".into() } else { m.join("::") };
        let names: Vec<String> = around.iter().map(name).collect();
        let rule = format!("files need each other: {} -> {}", names.join(" -> "), names[0]);
        let advice = "move what both need to a file of its own";
        found.push(Finding { path: files[module].path.clone(), line: 0, rule, advice });
    }
    found
}

/// The modules on a shortest way from `start` to itself, if there is one.
fn way_back<'a>(
    arrows: &BTreeMap<&'a Module, BTreeSet<&'a Module>>,
    start: &'a Module,
) -> Option<Vec<&'a Module>> {
    let (mut from, mut next) = (BTreeMap::new(), VecDeque::from([start]));
    while let Some(at) = next.pop_front() {
        for to in &arrows[at] {
            if *to == start {
                let way = std::iter::successors(Some(at), |m| (*m != start).then(|| from[m]));
                let mut way: Vec<_> = way.collect();
                way.reverse();
                return Some(way);
            }
            if !from.contains_key(to) {
                from.insert(*to, at);
                next.push_back(to);
            }
        }
    }
    None
}

/// The module that defines what `name` is in module `at`; None if that is another crate's.
fn resolve<'a>(files: &'a Crate, at: &Module, name: &[String], depth: usize) -> Option<&'a Module> {
    let (first, mut rest) = name.split_first()?;
    let child = [at.as_slice(), std::slice::from_ref(first)].concat();
    let mut module = match first.as_str() {
        "crate" => Module::new(),
        "self" => at.clone(),
        "super" => at[..at.len().saturating_sub(1)].to_vec(),
        _ if files.contains_key(&child) => child,
        _ => {
            let bound = files.get(at)?.binds.get(first).filter(|bound| bound[0] != *first && depth < 20)?;
            return resolve(files, at, &[bound.as_slice(), rest].concat(), depth + 1);
        }
    };
    while let Some((next, after)) = rest.split_first() {
        if next == "super" {
            module.pop();
        } else if files.contains_key(&[module.as_slice(), std::slice::from_ref(next)].concat()) {
            module.push(next.clone());
        } else if let Some(bound) = files.get(&module)?.binds.get(next).filter(|_| depth < 20) {
            return resolve(files, &module, &[bound.as_slice(), after].concat(), depth + 1);
        } else {
            break;
        }
        rest = after;
    }
    files.get_key_value(&module).map(|(module, _)| module)
}

fn read(source: &Source) -> File {
    let code: String =
        source.lines().into_iter().filter(|line| !line.in_test).map(|line| line.code + "\n").collect();
    let tokens = tokens(&code);
    let mut file = File { path: source.path.clone(), ..File::default() };
    let mut at = 0;
    while at < tokens.len() {
        let before = at.checked_sub(1).map_or(";", |before| tokens[before]);
        if tokens[at] == "use" && ["pub", ")", ";", "{", "}", "]"].contains(&before) {
            let mut bound = Vec::new();
            at = tree(&tokens, at + 1, &[], &mut bound);
            if !["pub", ")"].contains(&before) {
                file.names.extend(bound.iter().map(|(_, path)| path.clone()));
            }
            file.binds.extend(bound);
        } else {
            let mut path = vec![tokens[at].to_owned()];
            at += 1;
            while is_word(&path[0])
                && tokens.get(at) == Some(&"::")
                && tokens.get(at + 1).is_some_and(|t| is_word(t))
            {
                path.push(tokens[at + 1].to_owned());
                at += 2;
            }
            if path.len() > 1 && before != "::" {
                file.names.push(path);
            }
        }
    }
    file
}

/// What the tree of a `use` that begins at token `at` binds; returns where it ends.
fn tree(tokens: &[&str], mut at: usize, above: &[String], bound: &mut Vec<(String, Vec<String>)>) -> usize {
    let mut path = above.to_vec();
    while let Some(token) = tokens.get(at) {
        match *token {
            "{" => {
                while tokens.get(at).is_some_and(|t| ["{", ","].contains(t)) {
                    at = tree(tokens, at + 1, &path, bound);
                }
                return at + 1;
            }
            "," | "}" | ";" => break,
            "self" if !path.is_empty() => {}
            "::" => {}
            "as" => {
                bound.push((tokens.get(at + 1).map_or("_", |name| name).to_string(), path));
                return at + 2;
            }
            word => path.push(word.to_owned()),
        }
        at += 1;
    }
    if let Some(last) = path.last().filter(|_| path.len() > above.len() || tokens[at - 1] == "self").cloned()
    {
        bound.push((last, path));
    }
    at
}

/// Words, `::`, and every other character by itself.
fn tokens(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = match first {
            _ if rest.starts_with("::") => 2,
            c if is_word_char(c) => rest.find(|c| !is_word_char(c)).unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        found.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    found
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_word(token: &str) -> bool {
    token.starts_with(is_word_char)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let sources: Vec<_> = files.iter().map(|(path, text)| Source::new(*path, *text)).collect();
        no_circles(&sources).into_iter().map(|finding| finding.rule).collect()
    }

    #[test]
    fn files_that_need_each_other_are_found() {
        let a = ("x/src/a.rs", "use super::b::{self, f as g};\nfn h() {}\n");
        let told = ["files need each other: a -> b -> a"];
        for b in [
            "use crate::a::h;",
            "fn i() { crate::a::h() }",
            "use {crate::{a}};",
            "use super::{c::X, a::{h, j}};",
        ] {
            assert_eq!(found(&[a, ("x/src/b.rs", b)]), told, "{b}");
        }
        for b in [
            "",
            "// use crate::a::h;",
            "#[cfg(test)]\nmod tests { use crate::a::h; }",
            "use a::h;",
            "use y::a::h;",
        ] {
            assert_eq!(found(&[a, ("x/src/b.rs", b)]), [""; 0], "{b}");
        }
        assert_eq!(found(&[a, ("y/src/b.rs", "use crate::a::h;")]), [""; 0], "another crate");
    }

    #[test]
    fn a_name_that_is_passed_on_is_followed() {
        let lib = ("x/src/lib.rs", "mod a;\nmod b;\npub use b::{Error, c::deep as D};\n");
        let a = ("x/src/a.rs", "pub struct A;");
        let b = ("x/src/b.rs", "pub mod c;\nuse super::a;\npub enum Error { A(a::A) }");
        let c = ("x/src/b/c.rs", "pub fn deep() {}");
        assert_eq!(found(&[lib, a, b, c]), [""; 0]);
        let back = ("x/src/a.rs", "use crate::Error;\npub struct A;");
        assert_eq!(found(&[lib, back, b, c]), ["files need each other: a -> b -> a"]);
        let deep = ("x/src/b/c.rs", "use crate::a::A;");
        let far = ("x/src/a.rs", "fn a() { super::D() }");
        assert_eq!(found(&[lib, far, b, deep]), ["files need each other: a -> b::c -> a"]);
    }

    #[test]
    fn a_part_that_is_named_by_its_whole_does_not_name_it() {
        let part = ("x/src/a/b.rs", "use super::A;\nimpl A { fn f(&self) {} }");
        assert_eq!(found(&[("x/src/a.rs", "mod b;\npub struct A;"), part]), [""; 0]);
        let whole = ("x/src/a.rs", "mod b;\npub struct A;\nfn f() { b::g() }");
        assert_eq!(found(&[whole, part]), ["files need each other: a -> a::b -> a"]);
    }
}
