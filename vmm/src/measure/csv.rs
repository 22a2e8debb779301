//! Every number of a measurement as CSV: a line each, with the path that it has in the JSON.

use std::fmt::Write;

use serde_json::Value;

use super::output::Measured;

/// `path,value` lines, with a heading. The path is that of `--json`: `content.zero`,
/// `guests.0.name`, `pairs.0.1`.
pub(super) fn text(measured: &Measured) -> serde_json::Result<String> {
    let mut text = String::from("path,value\n");
    lines(&mut text, "", &serde_json::to_value(measured)?);
    Ok(text)
}

fn lines(text: &mut String, path: &str, value: &Value) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| lines(text, &below(name), value));
        }
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(n, value)| lines(text, &below(&n.to_string()), value));
        }
        Value::Null => {}
        Value::String(value) => {
            let _ = writeln!(text, "{path},\"{}\"", value.replace('"', "\"\""));
        }
        number => {
            let _ = writeln!(text, "{path},{number}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_is_a_line() {
        let mut text = String::new();
        let value = serde_json::json!({"a": {"b": [1, 2.5]}, "c": "say \"x\", y", "d": null, "e": true});
        lines(&mut text, "", &value);
        assert_eq!(text, "a.b.0,1\na.b.1,2.5\nc,\"say \"\"x\"\", y\"\ne,true\n");
    }
}
