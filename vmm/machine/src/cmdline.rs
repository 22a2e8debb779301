//! A kernel's command line, which ends where its init's begins: at the first parameter `--`.

/// `line` with `more` as the last of the kernel's own parameters: before `--`, after which the
/// kernel passes the rest to init. A `--` within quotes is part of a value.
pub fn append(line: &str, more: &str) -> String {
    let (own, inits) = line.split_at(end_of_parameters(line));
    let before = if own.is_empty() || own.ends_with(is_space) { "" } else { " " };
    let after = if inits.is_empty() { "" } else { " " };
    format!("{own}{before}{more}{after}{inits}")
}

/// What the kernel (`next_arg` in its lib/cmdline.c) takes for a gap between parameters.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// Where `--` begins, or the end. As the kernel reads it: quotes hold blanks together, and around a
/// whole parameter they are left out.
fn end_of_parameters(line: &str) -> usize {
    let (mut quoted, mut start) = (false, None);
    for (at, c) in line.char_indices().chain([(line.len(), ' ')]) {
        let ends = at == line.len() || (is_space(c) && !quoted);
        match start {
            Some(start) if ends && matches!(&line[start..at], "--" | "\"--\"" | "\"--") => return start,
            _ if ends => start = None,
            None => start = Some(at),
            Some(_) => {}
        }
        if c == '"' {
            quoted = !quoted;
        }
    }
    line.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_added_stands_before_inits_part() {
        for (line, expected) in [
            ("", "root=x"),
            ("quiet", "quiet root=x"),
            ("quiet ", "quiet root=x"),
            ("quiet -- single", "quiet root=x -- single"),
            ("quiet --", "quiet root=x --"),
            ("-- single", "root=x -- single"),
            ("--", "root=x --"),
            ("a -- b -- c", "a root=x -- b -- c"),
            ("a\t--\tb", "a\troot=x --\tb"),
            // No parameter by itself.
            ("a=-- --b c--", "a=-- --b c-- root=x"),
            ("a=\"x -- y\" -- z", "a=\"x -- y\" root=x -- z"),
            ("a=\"x -- y\"", "a=\"x -- y\" root=x"),
            ("\"a -- b\" c", "\"a -- b\" c root=x"),
            // The kernel takes quotes around a parameter away.
            ("a \"--\" b", "a root=x \"--\" b"),
            // A quote that is never closed holds everything after it together.
            ("a=\"x -- y", "a=\"x -- y root=x"),
        ] {
            assert_eq!(append(line, "root=x"), expected, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_line_is_too_much(line in "[ab\" =-]{0,40}") {
            let with = append(&line, "root=x");
            let at = with.find("root=x").unwrap();
            let without = format!("{}{}", &with[..at], &with[at + "root=x".len()..]);
            let words = |text: &str| text.split_whitespace().collect::<String>();
            prop_assert_eq!(words(&without), words(&line));
            prop_assert!(end_of_parameters(&with) >= at.min(with.len()));
        }
    }
}
