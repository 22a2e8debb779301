//! The JSON that the host puts there.

use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};
use thiserror::Error;

/// Why contents are refused; those that were there stay.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StoreError {
    #[error("The MMDS data store is not initialized.")]
    Empty,
    #[error("The MMDS data doesn't fit: it would have {bytes} bytes as JSON, and {limit} are the most.")]
    Size { bytes: usize, limit: usize },
    #[error("The MMDS data must be a JSON object.")]
    Kind,
}

/// The contents. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Store(Arc<Mutex<Option<Value>>>);

impl Store {
    /// What is there: null before something is put.
    pub fn get(&self) -> Value {
        os::lock(&self.0).clone().unwrap_or_default()
    }

    /// Puts something else there, of at most `limit` bytes.
    pub fn put(&self, value: Value, limit: usize) -> Result<(), StoreError> {
        if !value.is_object() {
            return Err(StoreError::Kind);
        }
        check(&value, limit)?;
        *os::lock(&self.0) = Some(value);
        Ok(())
    }

    /// Changes what is there by a merge patch (RFC 7396): a key that is null goes, objects are
    /// merged, all else takes the old value's place.
    pub fn patch(&self, patch: Value, limit: usize) -> Result<(), StoreError> {
        let Value::Object(patch) = patch else { return Err(StoreError::Kind) };
        let mut now = os::lock(&self.0);
        let mut value = now.clone().ok_or(StoreError::Empty)?;
        merge(&mut value, patch);
        check(&value, limit)?;
        *now = Some(value);
        Ok(())
    }

    /// What is at a path of keys, and numbers in lists. None if nothing is.
    pub(crate) fn at(&self, path: &str) -> Option<Value> {
        let now = os::lock(&self.0);
        let value = now.as_ref()?;
        let mut keys = path.split('/').filter(|key| !key.is_empty());
        keys.try_fold(value, |value, key| match value {
            Value::Object(keys) => keys.get(key),
            Value::Array(list) => list.get(key.parse::<usize>().ok()?),
            _ => None,
        })
        .cloned()
    }
}

fn check(value: &Value, limit: usize) -> Result<(), StoreError> {
    match value.to_string().len() {
        bytes if bytes > limit => Err(StoreError::Size { bytes, limit }),
        _ => Ok(()),
    }
}

/// As deep as the patch, whose depth serde_json's reader has bounded.
fn merge(value: &mut Value, patch: Map<String, Value>) {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(keys) = value else { return };
    for (key, change) in patch {
        match change {
            Value::Null => _ = keys.remove(&key),
            Value::Object(change) => merge(keys.entry(key).or_insert(Value::Null), change),
            other => _ = keys.insert(key, other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn contents_are_put_patched_and_found() {
        let store = Store::default();
        assert_eq!(store.get(), Value::Null);
        assert_eq!(store.patch(json!({}), 100), Err(StoreError::Empty));
        assert_eq!(store.put(json!([1]), 100), Err(StoreError::Kind));
        store.put(json!({"a": {"b": "c", "d": [1, {"e": 2}]}, "f": 3}), 100).unwrap();
        store.patch(json!({"a": {"b": null, "x": {"y": null, "z": 1}}, "f": [4]}), 100).unwrap();
        assert_eq!(store.get(), json!({"a": {"d": [1, {"e": 2}], "x": {"z": 1}}, "f": [4]}));
        for (path, found) in [
            ("/a/d/1/e", Some(json!(2))),
            ("//a//x/", Some(json!({"z": 1}))),
            ("/a/d/2", None),
            ("/a/d/-1", None),
            ("/a/b", None),
            ("/f/0/0", None),
        ] {
            assert_eq!(store.at(path), found, "{path}");
        }
        assert_eq!(store.at("/"), Some(store.get()));
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let store = Store::default();
        store.put(json!({"a": 1}), 10).unwrap();
        let long = json!({"b": "x".repeat(10 << 20)});
        for refused in [store.put(long.clone(), 51_200), store.patch(long, 51_200)] {
            assert!(matches!(refused, Err(StoreError::Size { bytes, limit: 51_200 }) if bytes > 10 << 20));
        }
        assert_eq!(store.patch(json!({"b": 22}), 10), Err(StoreError::Size { bytes: 14, limit: 10 }));
        assert_eq!(store.get(), json!({"a": 1}));
    }
}
