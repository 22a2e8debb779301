//! How keys of Firecracker's objects are read: null where a key is optional, and keys for which
//! Samepage has only what Firecracker has by default. Configurations that people copy spell them
//! out; what would be something else is refused by name.

use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;

/// A value; null is as good as no key.
pub(super) fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A key that may be null, or have one of these values, all of which come to what Samepage does.
fn only<'de, D: Deserializer<'de>>(
    deserializer: D,
    key: &str,
    is_default: fn(&Value) -> bool,
    expected: &str,
) -> Result<(), D::Error> {
    let value = Value::deserialize(deserializer)?;
    match value.is_null() || is_default(&value) {
        true => Ok(()),
        false => Err(D::Error::custom(format_args!(
            "{key} {value} is not supported by Samepage yet: expected {expected}null"
        ))),
    }
}

/// Functions for `deserialize_with`, each for a key of its name.
macro_rules! only {
    ($($key:ident: $is_default:expr, $expected:literal;)*) => {
        $(pub(super) fn $key<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
            only(deserializer, stringify!($key), $is_default, $expected)
        })*
    };
}

only! {
    io_engine: |value| value == "Sync", "\"Sync\" or ";
    socket: |_| false, "";
    rate_limiter: is_unlimited, "";
    serial_rate_limiter: is_open, "";
    kvm_capabilities: is_empty, "[] or ";
    cpuid_modifiers: is_empty, "[] or ";
    msr_modifiers: is_empty, "[] or ";
    properties: |value| value.as_object().is_some_and(|all| all.is_empty()), "";
}

/// The templates of Firecracker's change a guest's CPUID; Samepage's guests have what KVM supports.
pub(super) fn cpu_template<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<()>, D::Error> {
    only(deserializer, "cpu_template", |value| value == "None", "\"None\" or ").map(Some)
}

/// Two buckets, each null or as Firecracker has it that limits nothing: of no size, or filled in no
/// time.
fn is_unlimited(limiter: &Value) -> bool {
    let is_known = |key: &String| key == "bandwidth" || key == "ops";
    limiter.as_object().is_some_and(|buckets| buckets.keys().all(is_known) && buckets.values().all(is_open))
}

fn is_open(bucket: &Value) -> bool {
    let is_zero = |key| bucket.get(key).and_then(Value::as_u64) == Some(0);
    bucket.is_null() || is_zero("size") || is_zero("refill_time")
}

/// A section that may be there if nothing is in it.
pub(super) fn is_empty(section: &Value) -> bool {
    section.is_null() || section.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_limiter_that_limits_nothing_is_none() {
        for open in [
            json!({}),
            json!({"bandwidth": null, "ops": null}),
            json!({"ops": {"size": 0, "refill_time": 100}, "bandwidth": {"size": 5, "refill_time": 0}}),
        ] {
            assert!(is_unlimited(&open), "{open}");
        }
        for limit in [
            json!({"ops": {"size": 5, "refill_time": 100}}),
            json!({"bandwidth": {"size": 5}}),
            json!({"bandwith": null}),
            json!("none"),
            json!([]),
        ] {
            assert!(!is_unlimited(&limit), "{limit}");
        }
    }
}
