//! What a value of the store looks like to the guest.

use serde_json::Value;

/// As EC2's service shows it: an object as its keys, a line each, those of objects with a slash
/// behind; text as it is. None of anything else.
pub fn imds(value: &Value) -> Option<String> {
    match value {
        Value::Object(keys) => {
            let line = |(key, value): (&String, &Value)| match value {
                Value::Object(_) => format!("{key}/"),
                _ => key.clone(),
            };
            Some(keys.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
        Value::String(text) => Some(text.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn objects_are_lists_and_text_is_itself() {
        assert_eq!(imds(&json!({"a": {"x": 1}, "b": "c", "d": [1]})).unwrap(), "a/\nb\nd");
        assert_eq!(imds(&json!("two\nlines")).unwrap(), "two\nlines");
        for other in [json!(1), json!([1]), json!(true), Value::Null] {
            assert_eq!(imds(&other), None);
        }
    }
}
